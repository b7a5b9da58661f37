"""Divergences between the distributions of student and teacher over the vocabulary or parts of it.

A divergence is a function of the log-probs of both, `[..., outcome]`. It returns the terms whose
sum over all outcomes is the divergence, and their slopes d (sum of terms) / d log πS. Both can be
summed part by part, so that the whole vocabulary is never needed at once: the gradient to a
student's logit is slope - πS * sum of slopes.

The support defines the outcomes:

    full            each entry of the vocabulary
    student_top_k   the K entries most likely under the student, and one for all others (the tail)
    teacher_top_k   the K entries most likely under the teacher, and the tail
    sampled         only the sampled token: an estimate that is correct in expectation over tokens
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from rlad.objectives.masks import LARGEST_LOG_RATIO

Divergence = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(student's log-probs, teacher's log-probs) -> (terms, slopes), all of one shape."""
DivergenceName = Literal["jsd", "reverse_kl", "forward_kl"]
ClipGradient = Literal["zero", "straight_through"]


def generalised_jsd(
    student_logprobs: Tensor, teacher_logprobs: Tensor, *, beta: float = 0.5
) -> tuple[Tensor, Tensor]:
    """Compute terms and slopes of the generalised Jensen-Shannon divergence (arXiv 2306.13649).

        m = beta πT + (1 - beta) πS
        JSD_beta(πT || πS) = beta KL(πT || m) + (1 - beta) KL(πS || m)
        beta = 0: KL(πT || πS), the forward KL;   beta = 1: KL(πS || πT), the reverse KL

    The values at beta = 0 and 1 are TRL's definition: the limit of JSD_beta itself is 0 there. An
    entry of probability 0 has the log-prob -inf, and adds 0 where the formula says 0 * log 0.

    Adding a multiple of πS to all slopes does not change the gradient. The multiple is chosen so
    that slopes and gradient are exactly 0 where both models agree.
    """
    student = student_logprobs
    teacher = teacher_logprobs
    student_probs = student.exp()
    teacher_probs = teacher.exp()
    if beta == 0:
        return _times(teacher_probs, teacher - student), student_probs - teacher_probs
    if beta == 1:
        terms = _times(student_probs, student - teacher)
        return terms, terms
    # Compute log m from the larger log-prob and the distance to the smaller one. This works for any
    # small probability, and gives exactly log πS where both agree.
    teacher_is_larger = teacher > student
    less = torch.expm1(-(teacher - student).abs())
    of_smaller = torch.where(teacher_is_larger, (1 - beta) * less, beta * less)
    mixture = torch.where(teacher_is_larger, teacher, student) + torch.log1p(of_smaller)
    of_teacher = beta * _times(teacher_probs, teacher - mixture)
    of_student = (1 - beta) * _times(student_probs, student - mixture)
    return of_teacher + of_student, of_student


def gkd_divergence(*, beta: float = 0.5) -> Divergence:
    """Return JSD_beta; see `generalised_jsd`."""
    return partial(generalised_jsd, beta=beta)


def reverse_kl() -> Divergence:
    """Return KL(πS || πT)."""
    return partial(generalised_jsd, beta=1.0)


def divergence_of(divergence: DivergenceName = "jsd", *, beta: float = 0.5) -> Divergence:
    """Return a divergence by name; `beta` is the teacher's share in the mixture of `jsd`."""
    return partial(generalised_jsd, beta=_beta(divergence, beta))


def clipped_divergence_of(
    divergence: DivergenceName = "forward_kl",
    *,
    beta: float = 0.5,
    pointwise_clip: float | None = None,
    clip_gradient: ClipGradient = "zero",
) -> Divergence:
    """Return a divergence by name, with each term bounded by `pointwise_clip`; see `clipped`."""
    plain = divergence_of(divergence, beta=beta)
    if pointwise_clip is None:
        return plain
    # What was subtracted from the slopes, in multiples of πS: see `generalised_jsd`.
    taken = {0.0: -1.0, 1.0: 1.0}.get(_beta(divergence, beta), 0.0)
    return partial(
        clipped,
        divergence=plain,
        bound=pointwise_clip,
        taken=None if clip_gradient == "straight_through" else taken,
    )


def _beta(divergence: DivergenceName, beta: float) -> float:
    return {"jsd": beta, "reverse_kl": 1.0, "forward_kl": 0.0}[divergence]


def clipped(
    student_logprobs: Tensor,
    teacher_logprobs: Tensor,
    *,
    divergence: Divergence,
    bound: float,
    taken: float | None,
) -> tuple[Tensor, Tensor]:
    """Bound each term: the sum over v of min(term_v, bound).

    A bounded term has no slope of its own. So the softmax of the other terms pushes its entry
    *down*, although the teacher would raise it. With `taken` = None (straight-through) the slopes
    remain those of the unbounded terms; otherwise the slopes have been lowered by `taken` πS.
    """
    terms, slopes = divergence(student_logprobs, teacher_logprobs)
    if taken is not None:
        slopes = torch.where(terms > bound, -taken * student_logprobs.exp(), slopes)
    return terms.clamp(max=bound), slopes


def num_clipped(
    student_logprobs: Tensor, teacher_logprobs: Tensor, *, divergence: Divergence, bound: float
) -> tuple[Tensor, Tensor]:
    """Count the terms of a `clipped` divergence that are at its bound: the returned "terms" are 1
    there, 0 elsewhere, and the slopes are 0."""
    terms, _ = divergence(student_logprobs, teacher_logprobs)
    return (terms >= bound).to(terms), torch.zeros_like(terms)


def sampled_divergence(
    student_logprobs: Tensor, teacher_logprobs: Tensor, divergence: Divergence
) -> Tensor:
    """Estimate a divergence at each token from the token that the student sampled there.

    At the sampled token the value is term / πS and the gradient (slope / πS) ∇log πS. Their
    expectations over the student's tokens are the divergence and its gradient. The reverse KL gives
    (log πS - log πT) ∇log πS. Log-probs have any one shape; only the student gets a gradient.
    """
    # Terms and slopes are of degree 1 in (πS, πT), so dividing by πS means setting πS to 1.
    student = student_logprobs.detach()
    # The bound of e^80 keeps the forward KL within the range of float32.
    ratio = (teacher_logprobs.detach() - student).clamp(max=LARGEST_LOG_RATIO)
    value, slope = divergence(torch.zeros_like(ratio), ratio)
    return value + slope * (student_logprobs - student)


def with_tail(logprobs: Tensor) -> Tensor:
    """Append the log-prob of all outcomes that are not among `logprobs` [..., K], merged into one.

    The remainder of a sum near 1 is known only up to the rounding of the sum. It is never set to 0,
    since that would make the divergence infinite.
    """
    rest = 1 - logprobs.double().exp().sum(dim=-1, keepdim=True)
    return torch.cat([logprobs, rest.clamp(min=SMALLEST_TAIL).log().to(logprobs)], dim=-1)


SMALLEST_TAIL = 1e-7


def _times(probs: Tensor, log_ratio: Tensor) -> Tensor:
    """Return probs * log_ratio, and 0 where the probability is 0 and the ratio may be anything."""
    return torch.where(probs == 0, torch.zeros_like(probs), probs * log_ratio)
