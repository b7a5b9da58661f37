"""TOPD: on-policy distillation whose token rewards have a floor (arXiv 2607.04751).

r̃_t    = log( alpha πT / πold + 1 - alpha )         (constant; no reward)
A_t    = r̃_t + mean of the later r̃ of the completion, then normalised over all tokens of the group
loss_t = GRPO loss_t with the advantage A_t
"""

import torch
from torch import Tensor

from rlad.objectives.grpo import grpo_loss
from rlad.objectives.masks import clean, keep_finite

_EPSILON = 1e-4
"""The same as in group advantages of rewards."""


def topd_advantages(
    *,
    old_logprobs: Tensor,
    teacher_logprobs: Tensor,
    mask: Tensor,
    group_size: int,
    alpha: float = 0.1,
) -> Tensor:
    """Compute the advantages A_t [batch, token] of TOPD, 0 where masked or where a log-prob is not
    finite; see the formula above.

    The arguments [batch, token] hold whole groups, with the `group_size` completions of each prompt
    next to each other. Advantages are divided by the population standard deviation + 1e-4. The last
    token uses its own r̃ as the mean of the later ones. A group whose teacher agrees with the old
    policy everywhere has A = 0. Raises `ValueError` for alpha outside (0, 1) or a batch that is not
    a multiple of `group_size`.
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha is {alpha}; it must be between 0 and 1.")
    if mask.shape[0] % group_size:
        raise ValueError(
            f"the batch has {mask.shape[0]} completions; it must be a multiple of group_size = "
            f"{group_size}."
        )
    kept = keep_finite(mask, old_logprobs, teacher_logprobs)
    x = clean(teacher_logprobs, kept) - clean(old_logprobs, kept)

    # log(alpha e^x + 1 - alpha), without overflow and exactly 0 where the teacher agrees. For x > 0
    # e^x is factored out.
    below = (alpha * x.clamp(max=0).expm1()).log1p()
    above = ((1 - alpha) * (-x).clamp(max=0).expm1()).log1p()
    rewards = x.clamp(min=0) + below + above

    # Each token's reward plus the mean of the later ones. The last token has no later ones; a mean
    # of 0 would make it differ from the others only because of its position.
    later = rewards.sum(dim=1, keepdim=True) - rewards.cumsum(dim=1)
    num_later = kept.sum(dim=1, keepdim=True) - kept.cumsum(dim=1)
    mean_of_later = torch.where(num_later > 0, later / num_later.clamp(min=1), rewards)
    returns = clean(rewards + mean_of_later, kept)

    # Normalise over all tokens of a group.
    groups = returns.view(-1, group_size * mask.shape[1])
    keep = kept.view(-1, group_size * mask.shape[1])
    count = keep.sum(dim=1, keepdim=True).clamp(min=1)
    centred = clean(groups - groups.sum(dim=1, keepdim=True) / count, keep)
    std = (centred.square().sum(dim=1, keepdim=True) / count).sqrt()
    return (centred / (std + _EPSILON)).view(mask.shape)


def topd_loss(
    *,
    student_logprobs: Tensor,
    old_logprobs: Tensor,
    teacher_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the token loss of TOPD; see the formula above. `advantages` [batch, token] are those
    of `topd_advantages`.

    Log-probs [batch, token] (only the student carries a gradient), `mask` [batch, token] bool.
    Returns the token loss [batch, token], 0 where masked, and the stats of GRPO with
    `log_ratio_to_teacher`.
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
    log_ratio_to_teacher = (clean(student_logprobs, kept) - clean(teacher_logprobs, kept)).detach()
    return token_loss, stats | {
        "log_ratio_to_teacher": log_ratio_to_teacher,
        "dropped": mask & ~kept,
    }
