"""Bounded weights of an advantage from a contrast of log-probs, as in `rlsd`, `srpo`, and `trrd`
with role weights.

r_t = exp( clamp( sign(Â) δ_t, least, most ) )        (constant)

δ_t > 0 means that the evidence makes the token more likely. r is positive, so it changes how much a
token counts but never the sign of its advantage.
"""

import torch
from torch import Tensor

from rlad.objectives.masks import clean, keep_finite, masked_mean_of_rows


def evidence_ratio(
    advantages: Tensor, contrast: Tensor, *, least: float | None = None, most: float
) -> Tensor:
    """Compute r of each token; both tensors [batch, token], the contrast without gradient.

    The exponent is bounded before exp, so that it never overflows.
    """
    return (advantages.sign() * contrast).clamp(min=least, max=most).exp()


def weighed_by_role(
    advantages: Tensor,
    role_evidence: Tensor | None,
    kept: Tensor,
    *,
    evidence_weight: float,
    weight_clip: float,
    contrast_clip: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute Â w, and w as the stat `advantage_weight`, with SRPO's weight w of each token
    (`rlad.objectives.srpo`). All tensors are [batch, token].

    w is 1 where `role_evidence` is NaN or a token is not `kept`. Without `role_evidence` the result
    is Â, without a stat. w is positive, so it never changes the sign of an advantage. Raises
    `ValueError` for a negative λ or c, and for ε_w outside [0, 1).
    """
    if role_evidence is None:
        return advantages, {}
    if not (evidence_weight >= 0 and contrast_clip >= 0 and 0 <= weight_clip < 1):
        raise ValueError(
            f"evidence_weight is {evidence_weight}, contrast_clip {contrast_clip} and weight_clip "
            f"{weight_clip}; the first two must not be negative, the third in [0, 1)."
        )
    has_role = keep_finite(kept, role_evidence)
    contrast = clean(role_evidence, has_role).detach()
    ratio = evidence_ratio(advantages, contrast, least=-contrast_clip, most=contrast_clip)
    # Subtract the mean over the completion's tokens with a role, so that weight only moves among
    # them.
    mean = masked_mean_of_rows(ratio, has_role)
    weight = (1 + evidence_weight * (ratio - mean)).clamp(1 - weight_clip, 1 + weight_clip)
    weight = torch.where(has_role, weight, 1.0)
    return advantages * weight, {"advantage_weight": weight}
