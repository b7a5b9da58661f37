"""The clipped surrogate of all ratio-based objectives (arXiv 1707.06347, arXiv 2402.03300).

loss_t = -min( r_t A_t, clip(r_t, 1 - clip_low, 1 + clip_high) A_t )
"""

from typing import Literal

import torch
from torch import Tensor

from rlad.objectives.masks import bounded_exp, clean, masked_mean_of_rows

RatioLevel = Literal["token", "sequence"]


def clipped_surrogate(
    log_ratio: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    level: RatioLevel = "token",
    dual_clip: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the token loss of the clipped surrogate, 0 where masked, and its stats.

    All tensors `[batch, token]`; `log_ratio` and `advantages` are 0 outside the mask.
    `level="sequence"` replaces each token's log-ratio by the mean over its sequence (GSPO, arXiv
    2507.18071). `dual_clip` > 1 bounds the loss of a negative advantage by -dual_clip * A (arXiv
    1912.09729). A token is *gated* when the minimum takes the constant branch: its gradient is 0.
    """
    if level == "sequence":
        log_ratio = masked_mean_of_rows(log_ratio, mask).expand_as(log_ratio)
    # An infinite ratio would give NaN instead of the exact 0 of a gated token.
    ratio = bounded_exp(clean(log_ratio, mask))
    surrogate = torch.minimum(
        ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    )
    gated_positive = mask & (advantages > 0) & (ratio > 1 + clip_high)
    gated_negative = mask & (advantages < 0) & (ratio < 1 - clip_low)
    if dual_clip is not None:
        surrogate = torch.where(
            advantages < 0, torch.maximum(surrogate, dual_clip * advantages), surrogate
        )
        gated_negative = gated_negative | (mask & (advantages < 0) & (ratio > dual_clip))
    stats = {
        "ratio": ratio.detach(),
        "gated_positive": gated_positive,
        "gated_negative": gated_negative,
    }
    return -clean(surrogate, mask), stats
