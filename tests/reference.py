"""Independent slow references: Python loops over single tokens in float64, written from the papers' formulas.

Given floats they return floats; given float64 scalars of torch as log-probs, what they return can be differentiated.
"""

import math
from collections.abc import Sequence
from typing import Any

Rows = Sequence[Sequence[Any]]


def exp(x: Any) -> Any:
    return math.exp(x) if isinstance(x, float) else x.exp()


def surrogate(log_ratio: Any, advantage: float, clip_low: float, clip_high: float) -> Any:
    ratio = exp(log_ratio)
    clipped = min(max(ratio, 1 - clip_low), 1 + clip_high)
    return -min(ratio * advantage, clipped * advantage)


def trrd_token(s: Any, o: Any, t: Any, a: float, *, alpha: float, c: float | None, clip_low: float, clip_high: float) -> Any:
    to_teacher = s - t if c is None else min(max(s - t, -c), c)
    return surrogate(alpha * (s - o) + (1 - alpha) * to_teacher, a, clip_low, clip_high)


def grpo_token(s: Any, o: Any, a: float, *, clip_low: float, clip_high: float) -> Any:
    return surrogate(s - o, a, clip_low, clip_high)


def kl_token(s: Any, other: Any, estimator: str) -> Any:
    d = other - s
    return d * d / 2 if estimator == "k2" else exp(d) - d - 1


def opd_token(s: Any, o: Any, t: Any) -> Any:
    return -exp(s - o) * (t - o)


def sequence_mean(rows: Rows) -> Any:
    """Rows hold the losses of the masked tokens only."""
    kept = [row for row in rows if row]
    return sum(sum(row) / len(row) for row in kept) / len(kept)


def token_mean(rows: Rows) -> Any:
    return sum(map(sum, rows)) / sum(map(len, rows))


def constant_length(rows: Rows, length: int) -> Any:
    kept = [row for row in rows if row]
    return sum(map(sum, kept)) / (len(kept) * length)
