"""The figures of the guards: numbers made of a metric of the steps so far."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

Row = Mapping[str, float]
"""the numbers of a row of metrics.jsonl"""


@dataclass(frozen=True, slots=True)
class Figure:
    """A number made of a metric's values so far, to be compared with a limit; None while there are
    too few."""

    says: str
    of: Callable[[Sequence[float]], float | None]


def recent(window: int) -> Figure:
    """Take the median of the last `window` values."""
    return Figure(
        "each step" if window == 1 else f"median of {window} steps",
        lambda values: median(values[-window:]) if len(values) >= window else None,
    )


def change(window: int, floor: float) -> Figure:
    """Divide the median of the last `window` values by that of the first `window`, which counts as
    at least `floor`."""

    def of(values: Sequence[float]) -> float | None:
        if len(values) < 2 * window:
            return None
        return median(values[-window:]) / max(median(values[:window]), floor)

    return Figure(
        f"median of {window} steps over that of the first {window} (at least {floor:g})", of
    )


def jump(window: int, before: int) -> Figure:
    """Divide the median of the last `window` values by that of the `before` values before them."""

    def of(values: Sequence[float]) -> float | None:
        # A median of 0 before (a metric that was absent in effect) has no multiple.
        former = values[-window - before : -window]
        if len(former) < before or not (usual := median(former)):
            return None
        return median(values[-window:]) / usual

    return Figure(f"median of {window} steps over that of the {before} before", of)


# --- metrics that are made of others --------------------------------------------------------------


def _dropped_share(row: Row) -> float | None:
    dropped = row.get("objective/dropped_tokens/count")
    trained = row.get("objective/trained_tokens/count")
    if dropped is None or trained is None or not dropped + trained:
        return None
    return dropped / (dropped + trained)


# The two gates are separate: in a mean, one that closes fully would hide after one that is idle.
def _gated_share(row: Row) -> float | None:
    keys = ("objective/gated_positive/frac", "objective/gated_negative/frac")
    return max((row[key] for key in keys if key in row), default=None)


def _distance_to_teacher(row: Row) -> float | None:
    return abs(row["teacher/log_ratio/q50"]) if "teacher/log_ratio/q50" in row else None


DERIVED: dict[str, Callable[[Row], float | None]] = {
    "dropped / (dropped + trained tokens)": _dropped_share,
    "the larger of objective/gated_positive/frac and objective/gated_negative/frac": _gated_share,
    "size of teacher/log_ratio/q50": _distance_to_teacher,
}


def numbers_of(row: Mapping[str, Any]) -> Row:
    """Keep the numbers of a row of metrics.jsonl."""
    numbers = {key: float(value) for key, value in row.items() if isinstance(value, int | float)}
    return {key: value for key, value in numbers.items() if not math.isnan(value)}


def value_of(metric: str, row: Row) -> float | None:
    """Compute the metric of a step; None where it was not recorded."""
    return DERIVED[metric](row) if metric in DERIVED else row.get(metric)
