"""What the guards look at: a metric of the steps so far, and the number made of it that is compared
with a limit."""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

Row = Mapping[str, float]
"""the numbers of a row of metrics.jsonl"""


@dataclass(frozen=True, slots=True)
class Figure:
    """What is compared with the limit: a number made of a metric's values so far; None while there
    are too few."""

    says: str
    of: Callable[[Sequence[float]], float | None]


def recent(window: int) -> Figure:
    """Median of the last `window` values."""
    return Figure(
        "each step" if window == 1 else f"median of {window} steps",
        lambda values: median(values[-window:]) if len(values) >= window else None,
    )


def change(window: int, floor: float) -> Figure:
    """Median of the last `window` values, divided by that of the first `window`, which counts as at
    least `floor`."""

    def of(values: Sequence[float]) -> float | None:
        if len(values) < 2 * window:
            return None
        return median(values[-window:]) / max(median(values[:window]), floor)

    return Figure(
        f"median of {window} steps over that of the first {window} (at least {floor:g})", of
    )


def jump(window: int, before: int) -> Figure:
    """Median of the last `window` values, divided by that of the `before` values before them."""

    def of(values: Sequence[float]) -> float | None:
        former = values[-window - before : -window]
        if len(former) < before or not (usual := median(former)):
            return None
        return median(values[-window:]) / usual

    return Figure(f"median of {window} steps over that of the {before} before", of)


# --- metrics that are made of others --------------------------------------------------------------


def _dropped_share(row: Row) -> float | None:
    dropped, trained = (
        row.get(f"objective/{kind}_tokens/count") for kind in ("dropped", "trained")
    )
    return (
        None
        if dropped is None or trained is None or not dropped + trained
        else dropped / (dropped + trained)
    )


def _gated_share(row: Row) -> float | None:
    shares = [
        row[f"objective/gated_{sign}/frac"]
        for sign in ("positive", "negative")
        if f"objective/gated_{sign}/frac" in row
    ]
    return max(shares, default=None)


def _distance_to_teacher(row: Row) -> float | None:
    return abs(row["teacher/log_ratio/q50"]) if "teacher/log_ratio/q50" in row else None


DERIVED: dict[str, Callable[[Row], float | None]] = {
    "dropped / (dropped + trained tokens)": _dropped_share,
    "the larger of objective/gated_positive/frac and objective/gated_negative/frac": _gated_share,
    "size of teacher/log_ratio/q50": _distance_to_teacher,
}


def numbers_of(row: Mapping[str, Any]) -> Row:
    """What of a row of metrics.jsonl is a number that a float can hold."""
    return {
        key: float(value)
        for key, value in row.items()
        if (isinstance(value, float) and not math.isnan(value))
        or (isinstance(value, int) and abs(value) <= sys.float_info.max)
    }


def value_of(metric: str, row: Row) -> float | None:
    """The metric of a step; None where it was not recorded."""
    return DERIVED[metric](row) if metric in DERIVED else row.get(metric)
