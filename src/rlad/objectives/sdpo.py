"""SDPO, self-distillation policy optimisation (arXiv 2601.20802).

D_t    = JSD_beta(πT || πS) over the student's K likeliest tokens and the rest as one (constant πT)
w_t    = min(πS / πold, max_importance_weight)                                           (constant)
loss_t = (1 - reward_share) w_t D_t + reward_share GRPO loss_t

πT is the student's moving average, shown a correct completion of the group or the verifier's
feedback on its own wrong one.
"""

from functools import partial
from typing import Literal

from torch import Tensor

from rlad.objectives.grpo import grpo_loss
from rlad.objectives.masks import clean, keep_heard, per_token
from rlad.objectives.self_distillation import distillation_loss

TeacherEnters = Literal["loss", "advantage"]


def sdpo_loss(
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
    """Compute the token loss of SDPO; see the formula above, and `rlad.objectives.divergences`
    for the divergence.

    With `teacher_enters` = "advantage" it is GRPO's loss with the advantage reward_share Â + (1 -
    reward_share) (log πT - log πold) of the sampled token, for which `teacher_logprobs` is needed.
    `teacher_speaks` [batch] bool marks the completions on which the teacher is used (None: all). On
    the others the teacher's term is left out.

    Log-probs [batch, token] (only the student carries a gradient), `divergence_to_teacher` [batch,
    token] with gradient to the student, `advantages` [batch] or [batch, token], `mask` [batch,
    token] bool. Returns the token loss [batch, token], 0 where masked, and stats of that shape:
    `divergence_to_teacher`, `importance_weight`, `dropped` and, if the reward is used, those of
    GRPO. Raises `ValueError` if `teacher_logprobs` is missing for "advantage".
    """
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
