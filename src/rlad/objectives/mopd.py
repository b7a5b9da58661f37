"""MOPD, multi-rollout on-policy distillation (arXiv 2605.12652).

D_t    = JSD_beta(πT || πS) over the student's K likeliest tokens and the rest as one (constant πT)
w_t    = min(πS / πold, max_importance_weight)                                           (constant)
loss_t = (1 - reward_share) w_t D_t + reward_share GRPO loss_t

πT is the student's moving average or a larger model, shown correct and wrong completions of the
group.
"""

from torch import Tensor

from rlad.objectives.sdpo import TeacherEnters, sdpo_loss


def mopd_loss(
    *,
    student_logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    divergence_to_teacher: Tensor,
    teacher_logprobs: Tensor | None = None,
    teacher_speaks: Tensor | None = None,
    reward_share: float = 0.0,
    teacher_enters: TeacherEnters = "loss",
    max_importance_weight: float | None = 2.0,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the token loss of MOPD. Arguments and results are those of `sdpo_loss`."""
    return sdpo_loss(
        student_logprobs=student_logprobs,
        old_logprobs=old_logprobs,
        advantages=advantages,
        mask=mask,
        divergence_to_teacher=divergence_to_teacher,
        teacher_logprobs=teacher_logprobs,
        teacher_speaks=teacher_speaks,
        reward_share=reward_share,
        teacher_enters=teacher_enters,
        max_importance_weight=max_importance_weight,
        clip_low=clip_low,
        clip_high=clip_high,
    )
