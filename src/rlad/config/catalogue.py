"""The texts of `rlad list`: objectives, tasks, teachers and other settings with their
documentation. Imports no torch."""

import ast
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import tomli_w
from pydantic.fields import FieldInfo

from rlad.config.objective import OBJECTIVE_CONFIGS
from rlad.config.presets import ABOUT, PRESETS
from rlad.config.run import RunConfig
from rlad.config.task import TaskConfig
from rlad.config.teacher import TeacherConfig
from rlad.config.types import Annealed, Section, sections_in
from rlad.errors import UserError
from rlad.text import nearest

OBJECTIVES = Path(__file__).parents[1] / "objectives"


def _by_type(union: Any) -> dict[str, type[Section]]:
    return {
        get_args(section.model_fields["type"].annotation)[0]: section
        for section in sections_in(union)
    }


CONFIGS: dict[str, dict[str, type[Section]]] = {
    "objectives": dict(OBJECTIVE_CONFIGS),
    "tasks": _by_type(TaskConfig),
    "teachers": _by_type(TeacherConfig),
    "settings": {
        name: sections[0]
        for name, field in RunConfig.model_fields.items()
        if len(sections := sections_in(field.annotation)) == 1
    },
}
_CHOSEN_BY_TYPE = {"objective": "objectives", "task": "tasks", "teacher": "teachers"}


def names(what: str) -> dict[str, str]:
    """Return each name with one line about it."""
    about = {name: _documentation(what, name).partition("\n\n")[0] for name in CONFIGS[what]}
    if what == "settings":
        about |= {
            section: f"One of the types in `rlad list {plural}`, with its settings."
            for section, plural in _CHOSEN_BY_TYPE.items()
        }
        about |= {
            name: f"{field.description}; {_toml(field.default)} by default."
            if field.default is not None
            else f"{field.description}."
            for name, field in RunConfig.model_fields.items()
            if name not in about
        }
    return {name: _one_line(text) for name, text in (about | _presets(what)).items()}


def describe(what: str, name: str) -> str:
    """Return documentation and settings of one entry. Raises `UserError` with the nearest name if
    there is no such entry."""
    presets = _presets(what)
    if name in presets:
        settings = tomli_w.dumps(PRESETS[name]).strip()
        return f"{presets[name]}\n\nStands for these settings:\n\n{settings}"
    if what == "settings" and name in _CHOSEN_BY_TYPE:
        raise UserError(
            f"[{name}] has different settings for each type: see "
            f"`rlad list {_CHOSEN_BY_TYPE[name]}`."
        )
    if what == "settings" and name in names(what) and name not in CONFIGS[what]:
        return f"{name}\n\n{names(what)[name]}"
    if name not in CONFIGS[what]:
        known = [*CONFIGS[what], *presets]
        hint = nearest(name, known) or f"there are {', '.join(known)}."
        raise UserError(f"{name!r} is not one of the {what}: {hint}")
    section = name if what == "settings" else what.removesuffix("s")
    config = CONFIGS[what][name]
    parts = [_documentation(what, name), f"[{section}]\n{_settings(config)}"]
    teacher = getattr(config, "default_teacher", None)
    if teacher is not None:
        brought = tomli_w.dumps({"teacher": teacher}).strip()
        parts.append(f"If no [teacher] is chosen with it, this one is used:\n\n{brought}")
    return "\n\n".join([*parts, *_tables_inside(config, section, what)])


def _tables_inside(config: type[Section], section: str, what: str) -> Iterator[str]:
    """Yield the sections inside a section, at any depth."""
    for key, field in config.model_fields.items():
        # A setting may hold a section of its own, or several by name.
        if inner := _inner_sections(field):
            by_name = ".NAME" if get_origin(field.annotation) is dict else ""
            path = f"{section}.{key}{by_name}"
            header = f"[{path}]  # {_one_line(field.description or '')}".rstrip("# ")
            if len(inner) > 1:
                kinds = f"one of the types in `rlad list {what}`, with its settings"
                yield f"{header}\ntype = ...  # {kinds}"
            else:
                yield f"{header}\n{_settings(inner[0])}"
                yield from _tables_inside(inner[0], path, what)


def _presets(what: str) -> dict[str, str]:
    return ABOUT if what == "objectives" else {}


def _documentation(what: str, name: str) -> str:
    """Return the docstring of an objective's file, or of the config class of anything else."""
    # The file is read, not imported, since importing it would import torch.
    file = OBJECTIVES / f"{name}.py"
    if what == "objectives" and file.is_file():
        return ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return inspect.getdoc(CONFIGS[what][name]) or ""


def _settings(config: type[Section]) -> str:
    """Format a section in two columns: each setting with its default, then its meaning and the
    allowed values."""
    rows = []
    for name, field in config.model_fields.items():
        if _inner_sections(field):
            continue
        has_value = field.is_required() or field.default is not None
        setting = f"{name} = {_value_of(field)}" if has_value else f"# {name}"
        rows.append((setting, "; ".join(_about(field))))
    width = max(len(setting) for setting, _ in rows)
    return "\n".join(
        f"{setting:<{width}}  # {about}" if about else setting for setting, about in rows
    )


def _value_of(field: FieldInfo) -> str:
    """Return the default as TOML; for a required setting, its only possible value or dots."""
    if not field.is_required():
        return _toml(field.default)
    choices = _choices(field.annotation)
    return _toml(choices[0]) if len(choices) == 1 else "..."


def _about(field: FieldInfo) -> list[str]:
    """Return what a setting means, and the allowed values."""
    about = [_one_line(field.description)] if field.description else []
    choices = _choices(field.annotation)
    if len(choices) > 1:
        about.append(f"one of {', '.join(map(_toml, choices))}")
    if any(issubclass(section, Annealed) for section in sections_in(field.annotation)):
        about.append("or { start, end, change_per_step }")
    return [*about, "required"] if field.is_required() else about


def _inner_sections(field: FieldInfo) -> list[type[Section]]:
    """Return the sections that a setting may hold, directly or by name, except annealed ones."""
    return [one for one in sections_in(field.annotation) if not issubclass(one, Annealed)]


def _choices(annotation: Any) -> list[Any]:
    """Return the literal values of an annotation."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [choice for part in get_args(annotation) for choice in _choices(part)]


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _toml(value: Any) -> str:
    if isinstance(value, Annealed):
        numbers = [f"{name} = {number}" for name, number in value]
        return f"{{ {', '.join(numbers)} }}"
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)
