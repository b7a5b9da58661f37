"""Select with a mask, so that nothing outside of it reaches a value or a gradient."""

import torch
from torch import Tensor

LARGEST_LOG_RATIO = 80.0


def keep_finite(mask: Tensor, *values: Tensor) -> Tensor:
    """Return the tokens of `mask` at which all `values` are finite. All tensors `[batch,
    token]`."""
    for value in values:
        mask = mask & torch.isfinite(value.detach())
    return mask


def clean(values: Tensor, mask: Tensor) -> Tensor:
    """Return `values` where `mask` is True, 0 elsewhere. Nothing outside of the mask, not even NaN,
    reaches value or gradient."""
    return torch.where(mask, values, torch.zeros_like(values))


def bounded_exp(log_ratio: Tensor) -> Tensor:
    """Return e^x, and e^80 for every larger x, since float32 overflows beyond e^88."""
    return log_ratio.clamp(max=LARGEST_LOG_RATIO).exp()


def heard_tokens(mask: Tensor, teacher_speaks: Tensor | None) -> Tensor:
    """Return the tokens of `mask` in the completions on which the teacher is used, `teacher_speaks`
    `[batch]`; all for None."""
    return mask if teacher_speaks is None else mask & teacher_speaks[:, None]


def keep_heard(
    mask: Tensor, *values: Tensor, teacher_logprobs: Tensor, teacher_speaks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the tokens of `mask` at which all `values` are finite (the teacher's only where it is
    used), and those of them on which the teacher is used."""
    heard = heard_tokens(mask, teacher_speaks)
    kept = keep_finite(mask, *values) & (torch.isfinite(teacher_logprobs.detach()) | ~heard)
    return kept, kept & heard


def per_token(advantages: Tensor, mask: Tensor) -> Tensor:
    """Return advantages `[batch]` or `[batch, token]` as `[batch, token]`, 0 outside the mask."""
    wide = advantages[:, None].expand(mask.shape) if advantages.dim() == 1 else advantages
    return clean(wide, mask)


def masked_mean_of_rows(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over the masked tokens of each row, `[batch, 1]`; 0 for a row without any."""
    return clean(values, mask).sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)
