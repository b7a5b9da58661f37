"""OPSD, on-policy self-distillation (arXiv 2601.18734).

D_t    = sum_v min( πT(v) (log πT(v) - log πS(v)), pointwise_clip )                 (constant πT)
w_t    = min(πS / πold, max_importance_weight)                                           (constant)
loss_t = w_t D_t

πT is the initial student, shown the reference solution; v goes over the vocabulary. No term is
bounded by default.
"""

from torch import Tensor

from rlad.objectives.self_distillation import distillation_loss


def opsd_loss(
    *,
    student_logprobs: Tensor,
    old_logprobs: Tensor,
    mask: Tensor,
    divergence_to_teacher: Tensor,
    teacher_speaks: Tensor | None = None,
    max_importance_weight: float | None = 2.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the token loss of OPSD; see the formula above, and `rlad.objectives.divergences` for
    the divergence. OPSD uses no reward.

    Log-probs [batch, token] (only the student carries a gradient), `divergence_to_teacher` [batch,
    token] with gradient to the student, `mask` [batch, token] bool, `teacher_speaks` [batch] bool
    (None: all). Returns the token loss [batch, token], 0 where masked or the teacher is not used,
    and stats of that shape: `divergence_to_teacher`, `importance_weight`, `dropped`.
    """
    return distillation_loss(
        student_logprobs=student_logprobs,
        old_logprobs=old_logprobs,
        mask=mask,
        divergence_to_teacher=divergence_to_teacher,
        max_importance_weight=max_importance_weight,
        teacher_speaks=teacher_speaks,
    )
