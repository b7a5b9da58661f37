"""The knobs that an objective's config turns, as the keyword arguments of its function."""

import inspect
from collections.abc import Callable
from typing import Any

from rlad.config.types import Annealed


def at_step(knob: float | Annealed, step: int) -> float:
    """The value of a knob that may be annealed."""
    return knob.at(step) if isinstance(knob, Annealed) else knob


def objective_knobs(objective: Any, step: int) -> dict[str, Any]:
    """The keyword arguments that an objective's config gives its function at a step ("off" is
    None)."""
    knobs = {
        name: getattr(objective, name) for name in type(objective).model_fields if name != "type"
    }
    return {
        k: None if v == "off" else at_step(v, step) if isinstance(v, Annealed) else v
        for k, v in knobs.items()
    }


def taken_by(function: Callable[..., Any], knobs: dict[str, Any]) -> dict[str, Any]:
    """Those knobs that are arguments of a function."""
    return {
        name: value
        for name, value in knobs.items()
        if name in inspect.signature(function).parameters
    }
