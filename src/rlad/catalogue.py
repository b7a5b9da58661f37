"""`rlad list`: objectives, tasks and teachers with their documentation."""

import difflib
import inspect
import sys

from pydantic import BaseModel

from rlad.config import (
    ArithmeticConfig,
    CountdownConfig,
    GRPOConfig,
    JsonlConfig,
    KDRLConfig,
    KnightsAndKnavesConfig,
    LocalTeacherConfig,
    OPDConfig,
    ReasoningGymConfig,
    TRRDConfig,
)

CONFIGS: dict[str, dict[str, type[BaseModel]]] = {
    "objectives": {"trrd": TRRDConfig, "grpo": GRPOConfig, "kdrl": KDRLConfig, "opd": OPDConfig},
    "tasks": {
        "knights_and_knaves": KnightsAndKnavesConfig,
        "arithmetic": ArithmeticConfig,
        "countdown": CountdownConfig,
        "reasoning_gym": ReasoningGymConfig,
        "jsonl": JsonlConfig,
    },
    "teachers": {"local": LocalTeacherConfig},
}


def names(what: str) -> dict[str, str]:
    """Each name with one line about it."""
    return {name: _documentation(what, name).splitlines()[0] for name in CONFIGS[what]}


def describe(what: str, name: str) -> str:
    """Documentation and settings of one entry. `ValueError` with the nearest name when there is none."""
    if name not in CONFIGS[what]:
        near = difflib.get_close_matches(name, CONFIGS[what], n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(CONFIGS[what])}."
        raise ValueError(f"{name!r} is none of the {what}: {hint}")
    return f"{_documentation(what, name)}\n\nSettings ([{what.removesuffix('s')}] in the config):\n{_settings(CONFIGS[what][name])}"


def _documentation(what: str, name: str) -> str:
    if what != "objectives":
        return inspect.getdoc(CONFIGS[what][name]) or ""
    from rlad.objectives import OBJECTIVES

    return inspect.getdoc(sys.modules[OBJECTIVES[name].function.__module__]) or ""


def _settings(config: type[BaseModel]) -> str:
    lines = []
    for name, field in config.model_fields.items():
        default = "required" if field.is_required() else repr(field.default)
        about = f"   {field.description}" if field.description else ""
        lines.append(f"  {name} = {default}{about}")
    return "\n".join(lines)
