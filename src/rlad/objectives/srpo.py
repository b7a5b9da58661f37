"""SRPO: tokens count by how much they depend on picture or perception (arXiv 2605.07274).

δ_t = log πold(y_t | x, y_<t) - log πold(y_t | x without the evidence of its role)   (constant)
r_t = exp( sign(Â) clamp(δ_t, -c, c) )
w_t = clip( 1 + λ (r_t - mean of r over the completion's tokens with a role), 1 - ε_w, 1 + ε_w )
loss_t = GRPO loss_t with the advantage Â w_t
"""

from torch import Tensor

from rlad.objectives.evidence import weighed_by_role
from rlad.objectives.grpo import grpo_loss
from rlad.objectives.masks import keep_finite, per_token


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

    `role_evidence` is NaN for tokens without a role: tags, the answer, and completions that do not
    parse. Their weight is 1. δ = 0 everywhere, or λ = 0, is GRPO. The weight is positive, so it
    never changes the sign of an advantage.

    Log-probs and `role_evidence` [batch, token] (only the student carries a gradient), `advantages`
    [batch] or [batch, token], `mask` [batch, token] bool. Returns the token loss [batch, token], 0
    where masked, and the stats of GRPO with `advantage_weight`. Raises `ValueError` for a negative
    λ or c, and for ε_w outside [0, 1).
    """
    kept = keep_finite(mask, student_logprobs.detach(), old_logprobs)
    weighed_advantages, weighed = weighed_by_role(
        per_token(advantages, kept),
        role_evidence,
        kept,
        evidence_weight=evidence_weight,
        weight_clip=weight_clip,
        contrast_clip=contrast_clip,
    )
    token_loss, stats = grpo_loss(
        student_logprobs=student_logprobs,
        old_logprobs=old_logprobs,
        advantages=weighed_advantages,
        mask=kept,
        clip_low=clip_low,
        clip_high=clip_high,
    )
    return token_loss, stats | weighed | {"dropped": mask & ~kept}
