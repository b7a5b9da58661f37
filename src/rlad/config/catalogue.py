"""`rlad list`: objectives, tasks, teachers and the other settings with their documentation. Imports
no torch."""

import ast
import difflib
import inspect
import json
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import tomli_w
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from rlad.config.engine import EngineConfig
from rlad.config.objective import ObjectiveConfig
from rlad.config.presets import PRESETS
from rlad.config.run import (
    CheckpointConfig,
    EvaluationConfig,
    OptimizationConfig,
    RolloutConfig,
    StudentConfig,
)
from rlad.config.task import TaskConfig
from rlad.config.teacher import TeacherConfig
from rlad.config.types import Annealed
from rlad.errors import UserError

OBJECTIVES = Path(__file__).parents[1] / "objectives"


def _by_type(*configs: type[BaseModel]) -> dict[str, type[BaseModel]]:
    return {get_args(config.model_fields["type"].annotation)[0]: config for config in configs}


CONFIGS = {
    "objectives": _by_type(*get_args(ObjectiveConfig)),
    "tasks": _by_type(*get_args(TaskConfig)),
    "teachers": _by_type(*get_args(get_args(TeacherConfig)[0])),
    "settings": {
        "student": StudentConfig,
        "rollout": RolloutConfig,
        "optimization": OptimizationConfig,
        "evaluation": EvaluationConfig,
        "checkpoints": CheckpointConfig,
        "engine": EngineConfig,
    },
}


def names(what: str) -> dict[str, str]:
    """Each name with one line about it."""
    return {name: _documentation(what, name).splitlines()[0] for name in _names(what)}


def _names(what: str) -> list[str]:
    return [*CONFIGS[what], *(PRESETS if what == "objectives" else ())]


def describe(what: str, name: str) -> str:
    """Documentation and settings of one entry. `UserError` with the nearest name when there is
    none."""
    if name not in _names(what):
        near = difflib.get_close_matches(name, _names(what), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(_names(what))}."
        raise UserError(f"{name!r} is none of the {what}: {hint}")
    if name in PRESETS:
        return f"{_documentation(what, name)}\n\n{tomli_w.dumps(PRESETS[name][1]).strip()}"
    section, config = name if what == "settings" else what.removesuffix("s"), CONFIGS[what][name]
    inner = [
        _inner_section(section, key, field, what)
        for key, field in config.model_fields.items()
        if _sections_in(field)
    ]
    return "\n\n".join([_documentation(what, name), f"[{section}]\n{_settings(config)}", *inner])


def _documentation(what: str, name: str) -> str:
    """What opens the objective's file; the docstring of every other config."""
    if name in PRESETS:
        return f"{PRESETS[name][0]}\n\nStands for these settings:"
    if what != "objectives" or not (OBJECTIVES / f"{name}.py").is_file():
        return inspect.getdoc(CONFIGS[what][name]) or ""
    return (
        ast.get_docstring(ast.parse((OBJECTIVES / f"{name}.py").read_text(encoding="utf-8"))) or ""
    )


def _settings(config: type[BaseModel]) -> str:
    """The section as it stands in a config, with every default, what else is allowed, and what it
    means."""
    rows = []
    for name, field in sorted(config.model_fields.items(), key=lambda item: item[0] != "type"):
        if _sections_in(field):
            continue
        value = _value_of(field)
        about = "; ".join(
            part
            for part in (_about(field), _allowed(field), "required" * field.is_required())
            if part
        )
        rows.append((f"{name} = {value}" if value else f"# {name}", about))
    width = max(len(setting) for setting, _ in rows)
    return "\n".join(
        f"{setting:<{width}}  # {about}" if about else setting for setting, about in rows
    )


def _about(field: FieldInfo) -> str:
    """The description in one line."""
    return " ".join((field.description or "").split())


def _value_of(field: FieldInfo) -> str:
    """The default as TOML, empty for none; of a required setting the only possible value, or
    dots."""
    if not field.is_required():
        return "" if field.default is None else _toml(field.default)
    choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    return _toml(choices[0]) if len(choices) == 1 else "..."


def _sections_in(field: FieldInfo) -> list[type[BaseModel]]:
    """What a setting may hold that is a section itself, or several by name."""
    parts = _parts(field.annotation)
    return [
        part
        for part in parts
        if isinstance(part, type) and issubclass(part, BaseModel) and part is not Annealed
    ]


def _inner_section(section: str, name: str, field: FieldInfo, what: str) -> str:
    """A section within a section as it stands in a config: its settings, or where those of its
    types are shown."""
    key = name + ".NAME" * (get_origin(field.annotation) is dict)
    header = f"[{section}.{key}]  # {_about(field)}"
    kinds = _sections_in(field)
    if len(kinds) == 1:
        return f"{header}\n{_settings(kinds[0])}"
    return f"{header}\ntype = ...  # one of those that `rlad list {what}` names, with its settings"


def _allowed(field: FieldInfo) -> str:
    choices = [
        value
        for part in _parts(field.annotation)
        if get_origin(part) is Literal
        for value in get_args(part)
    ]
    told = f"one of {', '.join(map(_toml, choices))}" if len(choices) > 1 else ""
    can_move = any(part is Annealed for part in _parts(field.annotation))
    return "; ".join(
        part for part in (told, "or { start, end, change_per_step }" * can_move) if part
    )


def _parts(annotation: Any) -> list[Any]:
    """The alternatives of a union, without what is annotated to them."""
    if get_origin(annotation) is Literal or not get_args(annotation):
        return [annotation]
    return [part for argument in get_args(annotation) for part in _parts(argument)]


def _toml(value: Any) -> str:
    if isinstance(value, Annealed):
        return (
            "{ "
            + ", ".join(f"{name} = {number}" for name, number in value.model_dump().items())
            + " }"
        )
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)
