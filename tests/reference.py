"""Independent slow references: Python loops over single tokens in float64, written from the papers'
formulas.

Given floats they return floats; given float64 scalars of torch as log-probs, what they return can
be differentiated.
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


def trrd_token(
    s: Any,
    o: Any,
    t: Any,
    a: float,
    *,
    alpha: float,
    c: float | None,
    clip_low: float,
    clip_high: float,
) -> Any:
    to_teacher = s - t if c is None else min(max(s - t, -c), c)
    return surrogate(alpha * (s - o) + (1 - alpha) * to_teacher, a, clip_low, clip_high)


def grpo_token(s: Any, o: Any, a: float, *, clip_low: float, clip_high: float) -> Any:
    return surrogate(s - o, a, clip_low, clip_high)


def kl_token(s: Any, other: Any, estimator: str) -> Any:
    d = other - s
    return d * d / 2 if estimator == "k2" else exp(d) - d - 1


def skill_token(s: Any, o: Any, t: float, *, c: float | None, bound: float | None) -> Any:
    """rho (e^-l - 1 + l); beyond the bounds of the paper's formula it is the value alone that
    holds."""
    log_ratio = s - t if c is None else min(max(s - t, -c), c)
    rho = exp(s - o) if bound is None else min(exp(s - o), bound)
    return rho * (exp(-log_ratio) - 1 + log_ratio)


def opd_token(s: Any, o: Any, t: Any) -> Any:
    return -exp(s - o) * (t - o)


def kl(p: Sequence[Any], q: Sequence[Any]) -> Any:
    """KL(p || q) of two lists of log-probs over the vocabulary."""
    return sum(exp(x) * (x - y) for x, y in zip(p, q, strict=True))


def generalised_jsd(student: Sequence[Any], teacher: Sequence[float], *, beta: float) -> Any:
    """JSD_beta(teacher || student) as GKD defines it, the KL divergences at its ends."""
    if beta in (0, 1):
        return kl(teacher, student) if beta == 0 else kl(student, teacher)
    mixture = [
        (beta * exp(t) + (1 - beta) * exp(s)).log() for s, t in zip(student, teacher, strict=True)
    ]
    return beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture)


def outcomes(student: Sequence[Any], teacher: Sequence[float], ids: Sequence[int]) -> Any:
    """The log-probs of both of the entries `ids` and, as one, of all others."""
    others = [v for v in range(len(teacher)) if v not in ids]
    ours, theirs = [student[v] for v in ids], [teacher[v] for v in ids]
    if others:
        ours.append(sum(exp(student[v]) for v in others).log())
        theirs.append(math.log(sum(math.exp(teacher[v]) for v in others)))
    return ours, theirs


def sampled_divergence(s: Any, t: float, *, beta: float) -> Any:
    """JSD_beta estimated from one token: f(πT/πS), with d f(πT/πS) πS / d πS as its gradient."""
    ratio = math.exp(t - float(s.detach()))
    if beta == 1:
        value, slope = -math.log(ratio), -math.log(ratio)
    elif beta == 0:
        value, slope = ratio * math.log(ratio), 1 - ratio
    else:
        m = beta * ratio + 1 - beta
        slope = -(1 - beta) * math.log(m)
        value = slope + beta * ratio * math.log(ratio / m)
    return value + slope * (s - s.detach())


def divergence(
    student: Sequence[Any],
    teacher: Sequence[float],
    token: int,
    *,
    beta: float,
    support: str,
    top_k: int,
) -> Any:
    """Of one token, over a support."""
    if support == "sampled":
        return sampled_divergence(student[token], teacher[token], beta=beta)
    if support != "full":
        chooser = teacher
        if support == "student_top_k":
            chooser = [float(x.detach()) for x in student]
        ids = sorted(range(len(chooser)), key=lambda v: -chooser[v])[:top_k]
        student, teacher = outcomes(student, teacher, ids)
    return generalised_jsd(student, teacher, beta=beta)


def rlsd_weight(
    o: float, t: float, a: float, *, teacher_weight: float, weight_clip: float
) -> float:
    """The factor of the advantage; the logarithm is bounded before exp, which no clip of 1 +
    weight_clip <= 2 can see."""
    evidence = exp(min(t - o if a > 0 else o - t if a < 0 else 0.0, 5.0))
    return (
        1 - teacher_weight + teacher_weight * min(max(evidence, 1 - weight_clip), 1 + weight_clip)
    )


def srpo_weights(
    evidence: Sequence[float],
    a: float,
    *,
    evidence_weight: float,
    weight_clip: float,
    contrast_clip: float,
) -> list[float]:
    """The factors of the advantage of one completion; 1 for a token without a role (NaN)."""
    sign = (a > 0) - (a < 0)
    ratios = {
        j: math.exp(sign * min(max(value, -contrast_clip), contrast_clip))
        for j, value in enumerate(evidence)
        if math.isfinite(value)
    }
    weights = [1.0] * len(evidence)
    for j, ratio in ratios.items():
        mean = sum(ratios.values()) / len(ratios)
        weight = 1 + evidence_weight * (ratio - mean)
        weights[j] = min(max(weight, 1 - weight_clip), 1 + weight_clip)
    return weights


def distilled_rl_weights(
    o_row: Sequence[float], t_row: Sequence[float], a: float, *, weight_bound: float
) -> list[float]:
    """The factors of the advantage of one completion: clipped ratios over their geometric mean; 1
    unless it is positive."""
    if a <= 0:
        return [1.0] * len(o_row)
    factors = [
        min(max(math.exp(t - o), 1 / weight_bound), weight_bound)
        for o, t in zip(o_row, t_row, strict=True)
    ]
    geometric_mean = math.prod(factors) ** (1 / len(factors))
    return [factor / geometric_mean for factor in factors]


def topd_advantages(old: Rows, teacher: Rows, *, alpha: float) -> list[list[float]]:
    """Of one group; rows hold the log-probs of the trained tokens of each completion."""
    returns: list[list[float]] = []
    for o_row, t_row in zip(old, teacher, strict=True):
        rewards = [
            math.log(alpha * math.exp(t - o) + 1 - alpha) for o, t in zip(o_row, t_row, strict=True)
        ]
        row = []
        for position, reward in enumerate(rewards):
            later = rewards[position + 1 :]
            row.append(reward + (sum(later) / len(later) if later else reward))
        returns.append(row)
    everything = [value for row in returns for value in row]
    mean = sum(everything) / len(everything)
    std = math.sqrt(sum((value - mean) ** 2 for value in everything) / len(everything))
    return [[(value - mean) / (std + 1e-4) for value in row] for row in returns]


def group_advantages(rewards: Sequence[float | None], *, scale: str) -> list[float]:
    """Of one group; None is the reward of a completion that could not be judged."""
    judged = [reward for reward in rewards if reward is not None]
    if len(set(judged)) < 2:
        return [0.0] * len(rewards)
    mean = sum(judged) / len(judged)
    std = math.sqrt(sum((reward - mean) ** 2 for reward in judged) / len(judged))
    divisor = std + 1e-4 if scale == "std" else 1.0
    return [0.0 if reward is None else (reward - mean) / divisor for reward in rewards]


def annealed(knob: Any, step: int) -> Any:
    """The value at a step of a knob that is a number, or a table with start, end and
    change_per_step."""
    if not isinstance(knob, dict):
        return knob
    value, is_falling = knob["start"], knob["end"] < knob["start"]
    for _ in range(step):
        value += knob["change_per_step"]
    return max(value, knob["end"]) if is_falling else min(value, knob["end"])


def sequence_mean(rows: Rows) -> Any:
    """Rows hold the losses of the masked tokens only."""
    kept = [row for row in rows if row]
    return sum(sum(row) / len(row) for row in kept) / len(kept)


def token_mean(rows: Rows) -> Any:
    return sum(map(sum, rows)) / sum(map(len, rows))


def constant_length(rows: Rows, length: int) -> Any:
    kept = [row for row in rows if row]
    return sum(map(sum, kept)) / (len(kept) * length)
