"""Published variants of an objective as settings of it: `objective=dapo` stands for those that
`embedded/presets.toml` has under that name. Imports no torch."""

import copy
import tomllib
from pathlib import Path
from typing import Any

from rlad.config.objective import OBJECTIVE_CONFIGS

_FILE = Path(__file__).parents[1] / "embedded" / "presets.toml"
PRESETS: dict[str, dict[str, Any]] = tomllib.loads(_FILE.read_text(encoding="utf-8"))
ABOUT = {name: preset.pop("about") for name, preset in PRESETS.items()}


def expand_preset(table: dict[str, Any], base: dict[str, Any] | None = None) -> dict[str, Any]:
    """`table` over `base`, with the preset that its `objective.type` may name spelled out between
    the two, or the teacher that an objective brings along.

    So what stands beside the name of a preset is stronger than the preset, and the preset than the
    config it is laid upon.
    """
    base = base or {}
    match table.get("objective"):
        case {"type": str(name), **settings} if name in PRESETS:
            return merged(merged(base, PRESETS[name]), {**table, "objective": settings})
        case {"type": str(name)} if name in OBJECTIVE_CONFIGS and "teacher" not in table:
            # A whole section: settings of the teacher that was there are none of this one.
            teacher = OBJECTIVE_CONFIGS[name].default_teacher
            if teacher is not None:
                base = {**base, "teacher": copy.deepcopy(teacher)}
    return merged(base, table)


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with the keys of `changes` replaced or added, section by section."""
    both = {**base}
    for key, value in changes.items():
        old = both.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            value = merged(old, value)
        both[key] = value
    return both
