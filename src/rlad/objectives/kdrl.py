"""KDRL, GRPO plus a distillation term (arXiv 2506.02208, Eq. 9).

loss_t = GRPO loss_t + kd_coef * KL_t(πS || πT)
KL_t   = d^2 / 2 (k2) or e^d - d - 1 (k3),  d = log πT - log πS
"""

from typing import Literal

from torch import Tensor

from rlad.objectives.grpo import grpo_loss
from rlad.objectives.kl import KLEstimator, kl_tokens
from rlad.objectives.masks import clean, keep_finite


def kdrl_loss(
    *,
    student_logprobs: Tensor,
    old_logprobs: Tensor,
    teacher_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    kd_coef: float = 2e-3,
    kd_estimator: KLEstimator = "k2",
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    masking: Literal["none", "response", "group"] = "none",
    is_correct: Tensor | None = None,
    group_is_solved: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the token loss of KDRL; see the formula above. The teacher acts on every trained
    token, also where the advantage is 0.

    `masking` leaves the KL term out of correct responses (`response`, which needs `is_correct`
    [batch] bool) or of all responses of a group with a correct one (`group`, which needs
    `group_is_solved` [batch] bool).

    Log-probs [batch, token] (only the student carries a gradient), `advantages` [batch] or [batch,
    token], `mask` [batch, token] bool. Returns the token loss [batch, token], 0 where masked, and
    the stats of GRPO with `log_ratio_to_teacher` and `kl_to_teacher` (0 where it is left out).
    Raises `ValueError` for the estimator `k1` (see `kl_tokens`), and when what the masking needs is
    missing.
    """
    kept = keep_finite(mask, student_logprobs, old_logprobs, teacher_logprobs)
    token_loss, stats = grpo_loss(
        student_logprobs=student_logprobs,
        old_logprobs=old_logprobs,
        advantages=advantages,
        mask=kept,
        clip_low=clip_low,
        clip_high=clip_high,
    )
    distilled = kept
    if masking != "none":
        mastered = is_correct if masking == "response" else group_is_solved
        if mastered is None:
            needed = "is_correct" if masking == "response" else "group_is_solved"
            raise ValueError(f"KDRL with masking {masking!r} needs {needed} [batch].")
        distilled = kept & ~mastered[:, None]
    # Cleaned before the exponential of k3: an infinite value would leave NaN in the gradient.
    kl = kl_tokens(
        clean(student_logprobs, distilled),
        clean(teacher_logprobs, distilled),
        estimator=kd_estimator,
    )
    log_ratio_to_teacher = clean(student_logprobs, kept) - clean(teacher_logprobs, kept)
    return token_loss + kd_coef * kl, stats | {
        "log_ratio_to_teacher": log_ratio_to_teacher.detach(),
        "kl_to_teacher": kl.detach(),
        "dropped": mask & ~kept,
    }
