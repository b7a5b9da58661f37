"""The loss that `sdpo`, `mopd` and `opsd` share: a divergence to a teacher that is mostly the
student itself, shown more."""

from functools import partial
from typing import Literal

from torch import Tensor

from rlad.objectives.grpo import grpo_loss
from rlad.objectives.masks import bounded_exp, clean, keep_heard, per_token

TeacherEnters = Literal["loss", "advantage"]


def distillation_loss(
    *,
    student_logprobs: Tensor,
    old_logprobs: Tensor,
    mask: Tensor,
    divergence_to_teacher: Tensor,
    max_importance_weight: float | None,
    teacher_speaks: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute min(πS / πold, bound) D at each token, 0 where the teacher is silent; the weight is
    constant, and 1 where the student has not moved since it sampled."""
    kept, heard = keep_heard(
        mask,
        student_logprobs,
        old_logprobs,
        teacher_logprobs=divergence_to_teacher,
        teacher_speaks=teacher_speaks,
    )
    log_ratio = clean(student_logprobs, kept).detach() - clean(old_logprobs, kept)
    weight = bounded_exp(log_ratio)
    if max_importance_weight is not None:
        weight = weight.clamp(max=max_importance_weight)
    divergence = clean(divergence_to_teacher, heard)
    return weight * divergence, {
        "divergence_to_teacher": divergence.detach(),
        "importance_weight": weight,
        "dropped": mask & ~kept,
    }


def peer_distillation_loss(
    *,
    student_logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    divergence_to_teacher: Tensor,
    teacher_logprobs: Tensor | None,
    teacher_speaks: Tensor | None,
    reward_share: float,
    teacher_enters: TeacherEnters,
    max_importance_weight: float | None,
    clip_low: float,
    clip_high: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the loss of `sdpo` and `mopd`; see `rlad.objectives.sdpo`."""
    loss, stats = distillation_loss(
        student_logprobs=student_logprobs,
        old_logprobs=old_logprobs,
        mask=mask,
        divergence_to_teacher=divergence_to_teacher,
        max_importance_weight=max_importance_weight,
        teacher_speaks=teacher_speaks,
    )
    kept = mask & ~stats["dropped"]
    grpo = partial(
        grpo_loss,
        student_logprobs=student_logprobs,
        old_logprobs=old_logprobs,
        mask=kept,
        clip_low=clip_low,
        clip_high=clip_high,
    )
    if teacher_enters == "advantage":
        if teacher_logprobs is None:
            raise ValueError(
                "teacher_enters = 'advantage' needs teacher_logprobs [batch, token]: the log-ratio "
                "of the sampled token. A divergence over several tokens does not depend on which "
                "one was sampled, so as an advantage its expected gradient is 0."
            )
        _, heard = keep_heard(
            kept, teacher_logprobs=teacher_logprobs, teacher_speaks=teacher_speaks
        )
        log_ratio = clean(teacher_logprobs, heard) - clean(old_logprobs, heard)
        mixed = reward_share * per_token(advantages, kept) + (1 - reward_share) * log_ratio
        of_reward, of_grpo = grpo(advantages=mixed)
        return of_reward, of_grpo | stats
    if not reward_share:
        return loss, stats
    of_reward, of_grpo = grpo(advantages=advantages)
    return (1 - reward_share) * loss + reward_share * of_reward, of_grpo | stats
