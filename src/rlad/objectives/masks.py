"""Selecting with a mask: nothing outside of it reaches a value or a gradient."""

import torch
from torch import Tensor


def keep_finite(mask: Tensor, *values: Tensor) -> Tensor:
    """The tokens of `mask` at which every one of `values` is finite. All tensors `[batch,
    token]`."""
    for value in values:
        mask = mask & torch.isfinite(value.detach())
    return mask


def clean(values: Tensor, mask: Tensor) -> Tensor:
    """`values` where `mask` holds, 0 elsewhere; nothing outside the mask reaches value or gradient,
    be it NaN."""
    return torch.where(mask, values, torch.zeros_like(values))


def per_token(advantages: Tensor, mask: Tensor) -> Tensor:
    """Advantages `[batch]` or `[batch, token]` as `[batch, token]`, 0 outside the mask."""
    wide = advantages[:, None].expand(mask.shape) if advantages.dim() == 1 else advantages
    return clean(wide, mask)


def masked_mean_of_rows(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the masked tokens of each row, `[batch, 1]`; 0 for a row without any."""
    return clean(values, mask).sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)
