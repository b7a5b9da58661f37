"""Importance weights of tokens that were not sampled from the old policy.

w_t = exp( log πold(y_t) - log πrollout(y_t) ), of a token or of the whole sequence, bounded

A fast sampler computes the same model with other kernels and precision, so it samples from a policy
that differs a little from the trainer's. "token_truncate" is truncated importance sampling
(Yao et al. 2025, *Your efficient RL framework secretly brings you off-policy RL training*);
"token_mask" with both bounds is IcePop (Ling team 2025). The names are those of TRL's
`vllm_importance_sampling_mode`.
"""

from typing import Literal

import torch
from torch import Tensor

from rlad.objectives.masks import bounded_exp, clean, keep_finite

RolloutCorrection = Literal[
    "none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"
]


def rollout_weights(
    *,
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    mask: Tensor,
    mode: RolloutCorrection,
    clip_min: float | None = None,
    clip_max: float | None = 2.0,
) -> tuple[Tensor, Tensor]:
    """Compute the weights of a batch, and which of them the bounds have changed.

    All tensors are `[batch, token]`, without gradient; the weights are 1 where masked.
    "sequence_..." gives each token the product over its sequence. "..._truncate" sets weights
    outside of [clip_min, clip_max] to the nearer bound, "..._mask" to 0; None is no bound. A token
    without a finite log-prob from the sampler has the log-ratio 0.
    """
    kept = keep_finite(mask, old_logprobs, rollout_logprobs)
    log_ratio = clean(old_logprobs - rollout_logprobs, kept)
    if mode == "none":
        return torch.ones_like(log_ratio), torch.zeros_like(kept)
    weighed = kept
    if mode.startswith("sequence"):
        log_ratio = log_ratio.sum(dim=1, keepdim=True).expand_as(log_ratio)
        weighed = mask
    ratio = bounded_exp(log_ratio)
    bounded = ratio.clamp(clip_min or 0.0, clip_max)
    changed = weighed & (bounded != ratio)
    if mode.endswith("mask"):
        bounded = torch.where(changed, torch.zeros_like(ratio), ratio)
    return torch.where(weighed, bounded, torch.ones_like(bounded)), changed
