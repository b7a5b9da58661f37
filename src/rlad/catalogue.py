"""`rlad list`: objectives, tasks, teachers and the other settings with their documentation. Imports no torch."""

import ast
import difflib
import inspect
import json
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import tomli_w
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from rlad.config import (
    Annealed,
    EvaluationConfig,
    ObjectiveConfig,
    OptimizationConfig,
    RolloutConfig,
    StudentConfig,
    TaskConfig,
)
from rlad.presets import PRESETS
from rlad.teacher_config import TeacherConfig

OBJECTIVES = Path(__file__).parent / "objectives"


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
    },
}


def names(what: str) -> dict[str, str]:
    """Each name with one line about it."""
    return {name: _documentation(what, name).splitlines()[0] for name in _names(what)}


def _names(what: str) -> list[str]:
    return [*CONFIGS[what], *(PRESETS if what == "objectives" else ())]


def describe(what: str, name: str) -> str:
    """Documentation and settings of one entry. `ValueError` with the nearest name when there is none."""
    if name not in _names(what):
        near = difflib.get_close_matches(name, _names(what), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(_names(what))}."
        raise ValueError(f"{name!r} is none of the {what}: {hint}")
    if name in PRESETS:
        return f"{_documentation(what, name)}\n\n{tomli_w.dumps(PRESETS[name][1]).strip()}"
    section = name if what == "settings" else what.removesuffix("s")
    return f"{_documentation(what, name)}\n\n[{section}]\n{_settings(CONFIGS[what][name])}"


def _documentation(what: str, name: str) -> str:
    """What opens the objective's file; the docstring of every other config."""
    if name in PRESETS:
        return f"{PRESETS[name][0]}\n\nStands for these settings:"
    if what != "objectives" or not (OBJECTIVES / f"{name}.py").is_file():
        return inspect.getdoc(CONFIGS[what][name]) or ""
    return ast.get_docstring(ast.parse((OBJECTIVES / f"{name}.py").read_text(encoding="utf-8"))) or ""


def _settings(config: type[BaseModel]) -> str:
    """The section as it stands in a config, with every default, what else is allowed, and what it means."""
    rows = []
    for name, field in sorted(config.model_fields.items(), key=lambda item: item[0] != "type"):
        value = "..." if field.is_required() else "" if field.default is None else _toml(field.default)
        about = "; ".join(part for part in (field.description, _allowed(field), "required" * field.is_required()) if part)
        rows.append((f"{name} = {value}" if value else f"# {name}", about))
    width = max(len(setting) for setting, _ in rows)
    return "\n".join(f"{setting:<{width}}  # {about}" if about else setting for setting, about in rows)


def _allowed(field: FieldInfo) -> str:
    choices = [value for part in _parts(field.annotation) if get_origin(part) is Literal for value in get_args(part)]
    told = f"one of {', '.join(map(_toml, choices))}" if len(choices) > 1 else ""
    can_move = any(part is Annealed for part in _parts(field.annotation))
    return "; ".join(part for part in (told, "or { start, end, change_per_step }" * can_move) if part)


def _parts(annotation: Any) -> list[Any]:
    """The alternatives of a union, without what is annotated to them."""
    if get_origin(annotation) is Literal or not get_args(annotation):
        return [annotation]
    return [part for argument in get_args(annotation) for part in _parts(argument)]


def _toml(value: Any) -> str:
    if isinstance(value, Annealed):
        return "{ " + ", ".join(f"{name} = {number}" for name, number in value.model_dump().items()) + " }"
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)
