"""SRPO: what a token owes to the picture, or to what was seen, weighs it (arXiv 2605.07274).

δ_t = log πold(y_t | x, y_<t) - log πold(y_t | x without the evidence of its role)   (constant)
r_t = exp( sign(Â) clamp(δ_t, -c, c) )
w_t = clip( 1 + λ (r_t - mean of r over the completion's tokens with a role), 1 - ε_w, 1 + ε_w )
loss_t = GRPO loss_t with the advantage Â w_t
"""

import torch
from torch import Tensor

from rlad.objectives.evidence import evidence_ratio
from rlad.objectives.grpo import grpo_loss
from rlad.objectives.masks import clean, keep_finite, masked_mean_of_rows, per_token


def srpo_loss(
    *,
    student_logprobs: Tensor,
    old_logprobs: Tensor,
    role_evidence: Tensor,
    advantages: Tensor,
    mask: Tensor,
    evidence_weight: float = 0.5,
    weight_clip: float = 0.2,
    contrast_clip: float = 2.0,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the token loss of SRPO; see the formula above, with δ = `role_evidence`, λ =
    `evidence_weight`, ε_w = `weight_clip` and c = `contrast_clip`.

    `role_evidence` is NaN where a token has no role: tags, the answer, completions that do not
    parse. Those have the weight 1. δ = 0 everywhere, or λ = 0, is GRPO. The weight is positive, so
    it never changes the sign of an advantage.

    Log-probs and `role_evidence` [batch, token] (only the student carries a gradient), `advantages`
    [batch] or [batch, token], `mask` [batch, token] bool. Returns the token loss [batch, token], 0
    where masked, and the stats of GRPO with `advantage_weight`. Raises `ValueError` for a negative
    λ or c, and for ε_w outside [0, 1).
    """
    if not (evidence_weight >= 0 and contrast_clip >= 0 and 0 <= weight_clip < 1):
        raise ValueError(
            f"evidence_weight is {evidence_weight}, contrast_clip {contrast_clip} and weight_clip "
            f"{weight_clip}; the first two must not be negative, the third in [0, 1)."
        )
    kept = keep_finite(mask, student_logprobs.detach(), old_logprobs)
    has_role = keep_finite(kept, role_evidence)
    contrast = clean(role_evidence, has_role).detach()
    per_token_advantages = per_token(advantages, kept)
    ratio = evidence_ratio(per_token_advantages, contrast, least=-contrast_clip, most=contrast_clip)
    # The mean of a completion's tokens with a role, so that weights move between them.
    mean = masked_mean_of_rows(ratio, has_role)
    weight = (1 + evidence_weight * (ratio - mean)).clamp(1 - weight_clip, 1 + weight_clip)
    weight = torch.where(has_role, weight, 1.0)

    token_loss, stats = grpo_loss(
        student_logprobs=student_logprobs,
        old_logprobs=old_logprobs,
        advantages=per_token_advantages * weight,
        mask=kept,
        clip_low=clip_low,
        clip_high=clip_high,
    )
    return token_loss, stats | {"advantage_weight": weight, "dropped": mask & ~kept}
