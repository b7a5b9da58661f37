"""Group-relative advantages from rewards."""

from typing import Literal

import torch
from torch import Tensor

EPSILON = 1e-4


def group_advantages(
    rewards: Tensor,
    group_size: int,
    *,
    scale: Literal["std", "none"] = "std",
    judged: Tensor | None = None,
) -> Tensor:
    """Compute each rollout's advantage over the group of its prompt.

        A_i = (R_i - mean_G) / (std_G + 1e-4)    scale="std"   (GRPO, arXiv 2402.03300)
        A_i =  R_i - mean_G                      scale="none"  (Dr.GRPO, arXiv 2503.20783)

    std_G is the population standard deviation.

    `rewards` [batch] has the `group_size` rollouts of each prompt next to each other; returns
    [batch]. Rollouts that `judged` [batch] bool excludes do not enter mean and std, and get the
    advantage 0 (their rewards may be anything). Raises `ValueError` for a batch that does not
    consist of groups of at least 2 rollouts, and for a reward that is not finite.
    """
    if group_size < 2 or rewards.dim() != 1 or rewards.shape[0] % group_size:
        raise ValueError(
            f"group_size is {group_size} and rewards have shape {tuple(rewards.shape)}; a group "
            "needs at least 2 rollouts, and rewards must be [batch] with batch a multiple of it."
        )
    judged = torch.ones_like(rewards, dtype=torch.bool) if judged is None else judged
    bad = judged & ~torch.isfinite(rewards)
    if bad.any():
        where = int(bad.nonzero()[0])
        raise ValueError(
            f"reward {where} is {float(rewards[where])}; rewards must be finite: fix the "
            "verifier, or let it return 'cannot judge' for such completions."
        )
    rewards = rewards if rewards.is_floating_point() else rewards.double()
    values = rewards.view(-1, group_size)
    keep = judged.view(-1, group_size)
    count = keep.sum(dim=1, keepdim=True).clamp(min=1)
    mean = torch.where(keep, values, 0).sum(dim=1, keepdim=True) / count
    # Equal rewards are recognised by their range. Otherwise rounding of the mean would leave tiny
    # advantages, and dividing by their standard deviation would make them large.
    highest = values.masked_fill(~keep, -torch.inf).amax(dim=1, keepdim=True)
    lowest = values.masked_fill(~keep, torch.inf).amin(dim=1, keepdim=True)
    centred = torch.where(keep & (highest > lowest), values - mean, 0)
    if scale == "std":
        centred = centred / ((centred.square().sum(dim=1, keepdim=True) / count).sqrt() + EPSILON)
    return centred.flatten()
