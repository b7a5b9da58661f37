"""KDRL, GRPO plus a distillation term (arXiv 2506.02208, Eq. 9).

loss_t = GRPO loss_t + kd_coef * KL_t(πS || πT)
KL_t   = d^2 / 2 (k2) or e^d - d - 1 (k3),  d = log πT - log πS
KL_t   = sum_v πS(v) (log πS(v) - log πT(v)), over the vocabulary (exact) or K + 1 outcomes (top_k)
"""

from typing import Literal

from torch import Tensor

from rlad.objectives.grpo import grpo_loss
from rlad.objectives.kl import kl_tokens
from rlad.objectives.masks import clean, keep_heard


def kdrl_loss(
    *,
    student_logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    teacher_logprobs: Tensor | None = None,
    divergence_to_teacher: Tensor | None = None,
    kd_coef: float = 2e-3,
    kd_estimator: Literal["k2", "k3", "exact", "top_k"] = "k2",
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    teacher_speaks: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the token loss of KDRL; see the formula above. The KL term applies to every trained
    token, also where the advantage is 0.

    The estimators k2 and k3 need `teacher_logprobs`; exact and top_k need `divergence_to_teacher`,
    the reverse KL, with gradient to the student. `teacher_speaks` [batch] bool marks the
    completions on which the teacher is used (None: all). On the others the KL term is left out.

    Log-probs [batch, token] (only the student carries a gradient), `advantages` [batch] or [batch,
    token], `mask` [batch, token] bool. Returns the token loss [batch, token], 0 where masked, and
    the stats of GRPO with `kl_to_teacher` (0 where it is left out) and, with k2 and k3,
    `log_ratio_to_teacher`. Raises `ValueError` for the estimator `k1` (see `kl_tokens`), and if the
    tensor that the estimator needs is missing.
    """
    is_sampled = kd_estimator not in ("exact", "top_k")
    of_teacher = teacher_logprobs if is_sampled else divergence_to_teacher
    if of_teacher is None:
        needed = "teacher_logprobs" if is_sampled else "divergence_to_teacher"
        raise ValueError(f"KDRL with the estimator {kd_estimator!r} needs {needed} [batch, token].")
    kept, heard = keep_heard(
        mask,
        student_logprobs,
        old_logprobs,
        teacher_logprobs=of_teacher,
        teacher_speaks=teacher_speaks,
    )
    token_loss, stats = grpo_loss(
        student_logprobs=student_logprobs,
        old_logprobs=old_logprobs,
        advantages=advantages,
        mask=kept,
        clip_low=clip_low,
        clip_high=clip_high,
    )
    # Clean before the exponential of k3: an infinite value would leave NaN in the gradient.
    kl = clean(of_teacher, heard)
    if is_sampled:
        student = clean(student_logprobs, heard)
        stats = stats | {"log_ratio_to_teacher": (student - kl).detach()}
        kl = kl_tokens(student, kl, estimator=kd_estimator)
    return token_loss + kd_coef * kl, stats | {
        "kl_to_teacher": kl.detach(),
        "dropped": mask & ~kept,
    }
