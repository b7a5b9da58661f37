"""Divergences between the distributions of teacher and student over the vocabulary.

A divergence is a function of the log-probs of both, `[..., entry]`, for all entries of the
vocabulary or some of them. It returns the terms whose sum over the vocabulary is the divergence,
and their slopes d (sum of terms) / d log πS. Both can be summed part by part, so that the whole
vocabulary need not exist at once: the gradient to a student's logit is slope - πS * sum of slopes.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Divergence = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(student's log-probs, teacher's log-probs) -> (terms, slopes), all of one shape"""


def generalised_jsd(
    student_logprobs: Tensor, teacher_logprobs: Tensor, *, beta: float = 0.5
) -> tuple[Tensor, Tensor]:
    """Terms and slopes of the generalised Jensen-Shannon divergence (arXiv 2306.13649).

        m = beta πT + (1 - beta) πS
        JSD_beta(πT || πS) = beta KL(πT || m) + (1 - beta) KL(πS || m)
        beta = 0: KL(πT || πS), the forward KL;   beta = 1: KL(πS || πT), the reverse KL

    The ends are those of TRL: the limit of JSD_beta itself is 0 there. An entry of probability 0
    has the log-prob -inf, and adds 0 where the formula says 0 * log 0.
    """
    student = student_logprobs
    teacher = teacher_logprobs
    student_probs = student.exp()
    teacher_probs = teacher.exp()
    if beta == 0:
        return _times(teacher_probs, teacher - student), -teacher_probs
    if beta == 1:
        terms = _times(student_probs, student - teacher)
        return terms, terms + student_probs  # d(p log p/q) / d log p
    # log m, computed from the logarithms: no probability is too small for it.
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log(1 - beta))
    of_teacher = beta * _times(teacher_probs, teacher - mixture)
    of_student = (1 - beta) * _times(student_probs, student - mixture)
    return of_teacher + of_student, of_student


def _times(probs: Tensor, log_ratio: Tensor) -> Tensor:
    """probs * log_ratio, 0 where the probability is 0 and the ratio may be anything."""
    return torch.where(probs == 0, torch.zeros_like(probs), probs * log_ratio)
