"""Distilled RL: the teacher distributes positive advantages over the tokens (arXiv 2607.17247).

f_t    = clip(πT / πold, 1/b, b)                   (constant; b = 3)
w_t    = f_t / geometric mean of f over the completion's trained tokens where Â > 0, else 1
loss_t = GRPO loss_t with the advantage Â w_t
"""

import math

import torch
from torch import Tensor

from rlad.objectives.grpo import grpo_loss
from rlad.objectives.masks import clean, keep_heard, masked_mean_of_rows, per_token


def distilled_rl_loss(
    *,
    student_logprobs: Tensor,
    old_logprobs: Tensor,
    teacher_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    weight_bound: float = 3.0,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    teacher_speaks: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the token loss of Distilled RL; see the formula above, with b = `weight_bound`.

    The logarithms of a completion's weights sum to 0: the teacher distributes its advantage over
    its tokens. Negative advantages do not change, and b = 1 is GRPO.

    `teacher_speaks` [batch] bool marks the completions on which the teacher is used (None: all). On
    the others the weight is 1, which is GRPO.

    Log-probs [batch, token] (only the student carries a gradient), `advantages` [batch] or [batch,
    token], `mask` [batch, token] bool. Returns the token loss [batch, token], 0 where masked, and
    the stats of GRPO with `log_ratio_to_teacher` and `advantage_weight`. Raises `ValueError` for b
    below 1.
    """
    if weight_bound < 1:
        raise ValueError(f"weight_bound is {weight_bound}; it must be at least 1 (1 = GRPO).")
    kept, heard = keep_heard(
        mask,
        student_logprobs,
        old_logprobs,
        teacher_logprobs=teacher_logprobs,
        teacher_speaks=teacher_speaks,
    )
    old = clean(old_logprobs, heard).detach()
    teacher = clean(teacher_logprobs, heard).detach()
    per_token_advantages = per_token(advantages, kept)

    # Clip and divide logarithms, so that nothing overflows.
    bound = math.log(weight_bound)
    log_factor = (teacher - old).clamp(-bound, bound)
    weight = (log_factor - masked_mean_of_rows(log_factor, kept)).exp()
    weight = torch.where(per_token_advantages > 0, weight, torch.ones_like(weight))

    token_loss, stats = grpo_loss(
        student_logprobs=student_logprobs,
        old_logprobs=old_logprobs,
        advantages=per_token_advantages * weight,
        mask=kept,
        clip_low=clip_low,
        clip_high=clip_high,
    )
    return token_loss, stats | {
        "log_ratio_to_teacher": clean(student_logprobs, heard).detach() - teacher,
        "advantage_weight": weight,
        "dropped": mask & ~kept,
    }
