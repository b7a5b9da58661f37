"""Published variants of an objective as settings of it: `objective=dapo` stands for these. Imports
no torch."""

from typing import Any

PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "dapo": (
        "DAPO's clip and token mean (arXiv 2503.14476), without its dynamic sampling and overlong "
        "shaping",
        {
            "objective": {"type": "grpo", "clip_low": 0.2, "clip_high": 0.28},
            "optimization": {"aggregation": "token_mean"},
        },
    ),
    "dr_grpo": (
        "Dr.GRPO: advantages without standard deviation, losses divided by a constant length "
        "(arXiv 2503.20783)",
        {
            "objective": {"type": "grpo", "clip_low": 0.2, "clip_high": 0.2},
            "optimization": {"aggregation": "constant_length", "advantage_scale": "none"},
        },
    ),
    "gspo": (
        "GSPO: one length-normalised ratio for each sequence, with its narrow clip (arXiv "
        "2507.18071)",
        {
            "objective": {
                "type": "grpo",
                "ratio_level": "sequence",
                "clip_low": 3e-4,
                "clip_high": 4e-4,
            }
        },
    ),
    "kdrl_annealed": (
        "KDRL with the coefficient of its KL term annealed (arXiv 2506.02208)",
        {
            "objective": {
                "type": "kdrl",
                "kd_coef": {"start": 5e-3, "end": 1e-3, "change_per_step": -5e-5},
            }
        },
    ),
}


def expand_preset(table: dict[str, Any], base: dict[str, Any] | None = None) -> dict[str, Any]:
    """`table` over `base`, with the preset that its `objective.type` may name spelled out between
    the two.

    So what stands beside the name of a preset is stronger than the preset, and the preset than the
    config it is laid upon.
    """
    base = base or {}
    objective = table.get("objective")
    name = objective.get("type") if isinstance(objective, dict) else None
    if not (isinstance(objective, dict) and isinstance(name, str) and name in PRESETS):
        return merged(base, table)
    without_name = {
        **table,
        "objective": {key: value for key, value in objective.items() if key != "type"},
    }
    return merged(merged(base, PRESETS[name][1]), without_name)


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with the keys of `changes` replaced or added, section by section."""
    both = {**base}
    for key, value in changes.items():
        old = both.get(key)
        both[key] = (
            merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
        )
    return both
