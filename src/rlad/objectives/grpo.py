"""GRPO, Group Relative Policy Optimization (arXiv 2402.03300, Eq. 3).

log r_t = log πS - log πold
loss_t  = -min( r_t Â, clip(r_t, 1 - clip_low, 1 + clip_high) Â )
"""

from torch import Tensor

from rlad.objectives.masks import clean, keep_finite, per_token
from rlad.objectives.ratio import RatioLevel, clipped_surrogate


def grpo_loss(
    *,
    student_logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    ratio_level: RatioLevel = "token",
    dual_clip: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the token loss of GRPO; see the formula above.

    `student_logprobs`, `old_logprobs` [batch, token] (only the student carries a gradient),
    `advantages` [batch] or [batch, token], `mask` [batch, token] bool. Returns the token loss
    [batch, token], 0 where masked, and stats of that shape: `ratio`, `gated_positive`,
    `gated_negative`, `dropped` (trained tokens with a non-finite log-prob, left out).
    """
    kept = keep_finite(mask, student_logprobs, old_logprobs)
    log_ratio = clean(student_logprobs, kept) - clean(old_logprobs, kept)
    token_loss, stats = clipped_surrogate(
        log_ratio,
        per_token(advantages, kept),
        kept,
        clip_low=clip_low,
        clip_high=clip_high,
        level=ratio_level,
        dual_clip=dual_clip,
    )
    return token_loss, stats | {"dropped": mask & ~kept}
