"""Published variants of an objective. `objective=dapo` stands for the settings under that name in
`embedded/presets.toml`. Imports no torch."""

import copy
import tomllib
from pathlib import Path
from typing import Any

from rlad.config.objective import OBJECTIVE_CONFIGS

_FILE = Path(__file__).parents[1] / "embedded" / "presets.toml"
PRESETS: dict[str, dict[str, Any]] = tomllib.loads(_FILE.read_text(encoding="utf-8"))
ABOUT = {name: preset.pop("about") for name, preset in PRESETS.items()}


def expand_preset(table: dict[str, Any], base: dict[str, Any] | None = None) -> dict[str, Any]:
    """Merge `table` into `base`, with the preset that `objective.type` may name, or the objective's
    default teacher, between the two.

    So the settings next to a preset's name override the preset, and the preset overrides `base`.
    """
    base = base or {}
    match table.get("objective"):
        case {"type": str(name), **settings} if name in PRESETS:
            return merged(merged(base, PRESETS[name]), {**table, "objective": settings})
        case {"type": str(name)} if name in OBJECTIVE_CONFIGS and "teacher" not in table:
            # Replace the whole section: settings of the earlier teacher do not apply to this one.
            teacher = OBJECTIVE_CONFIGS[name].default_teacher
            if teacher is not None:
                base = {**base, "teacher": copy.deepcopy(teacher)}
    return merged(base, table)


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return `base` with the keys of `changes` replaced or added, section by section."""
    both = {**base}
    for key, value in changes.items():
        old = both.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            value = merged(old, value)
        both[key] = value
    return both
