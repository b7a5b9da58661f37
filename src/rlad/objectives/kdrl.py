"""KDRL, GRPO plus a distillation term (arXiv 2506.02208, Eq. 9).

loss_t = GRPO loss_t + kd_coef * KL_t(πS || πT)
KL_t   = d^2 / 2 (k2) or e^d - d - 1 (k3),  d = log πT - log πS
"""

from torch import Tensor

from rlad.objectives.grpo import grpo_loss
from rlad.objectives.kl import KLEstimator, kl_tokens
from rlad.objectives.masks import clean, keep_heard


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
    teacher_speaks: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the token loss of KDRL; see the formula above. The teacher acts on every trained
    token, also where the advantage is 0.

    `teacher_speaks` [batch] bool (None: everywhere) says on which completions the teacher has a
    say; on the others the KL term is left out.

    Log-probs [batch, token] (only the student carries a gradient), `advantages` [batch] or [batch,
    token], `mask` [batch, token] bool. Returns the token loss [batch, token], 0 where masked, and
    the stats of GRPO with `log_ratio_to_teacher` and `kl_to_teacher` (0 where it is left out).
    Raises `ValueError` for the estimator `k1` (see `kl_tokens`).
    """
    kept, heard = keep_heard(
        mask,
        student_logprobs,
        old_logprobs,
        teacher_logprobs=teacher_logprobs,
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
    # Cleaned before the exponential of k3: an infinite value would leave NaN in the gradient.
    student = clean(student_logprobs, heard)
    teacher = clean(teacher_logprobs, heard)
    kl = kl_tokens(student, teacher, estimator=kd_estimator)
    return token_loss + kd_coef * kl, stats | {
        "log_ratio_to_teacher": (student - teacher).detach(),
        "kl_to_teacher": kl.detach(),
        "dropped": mask & ~kept,
    }
