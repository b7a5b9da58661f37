"""Independent slow references: Python loops over single tokens in float64, written from the papers' formulas."""

import math
from collections.abc import Sequence

Rows = Sequence[Sequence[float]]


def surrogate(log_ratio: float, advantage: float, clip_low: float, clip_high: float) -> float:
    ratio = math.exp(log_ratio)
    clipped = min(max(ratio, 1 - clip_low), 1 + clip_high)
    return -min(ratio * advantage, clipped * advantage)


def trrd_token(
    s: float, o: float, t: float, a: float, *, alpha: float, c: float | None, clip_low: float, clip_high: float
) -> float:
    to_teacher = s - t if c is None else min(max(s - t, -c), c)
    return surrogate(alpha * (s - o) + (1 - alpha) * to_teacher, a, clip_low, clip_high)


def grpo_token(s: float, o: float, a: float, *, clip_low: float, clip_high: float) -> float:
    return surrogate(s - o, a, clip_low, clip_high)


def kl_token(s: float, other: float, estimator: str) -> float:
    d = other - s
    return d * d / 2 if estimator == "k2" else math.exp(d) - d - 1


def opd_token(s: float, o: float, t: float) -> float:
    return -math.exp(s - o) * (t - o)


def sequence_mean(rows: Rows) -> float:
    """Rows hold the losses of the masked tokens only."""
    kept = [row for row in rows if row]
    return sum(sum(row) / len(row) for row in kept) / len(kept)


def token_mean(rows: Rows) -> float:
    return sum(map(sum, rows)) / sum(map(len, rows))


def constant_length(rows: Rows, length: int) -> float:
    kept = [row for row in rows if row]
    return sum(map(sum, kept)) / (len(kept) * length)
