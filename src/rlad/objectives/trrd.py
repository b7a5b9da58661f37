"""TRRD, Trust Region Ratio Distillation (RLAD, arXiv 2602.22495, Eq. 3-5; the clamp: Appendix B).

log r_t = alpha * (log πS - log πold) + (1 - alpha) * clamp(log πS - log πT, -c, +c)
loss_t  = -min( r_t Â, clip(r_t, 1 - clip_low, 1 + clip_high) Â )
"""

import torch
from torch import Tensor

from rlad.objectives.evidence import weighed_by_role
from rlad.objectives.masks import clean, keep_heard, per_token
from rlad.objectives.ratio import RatioLevel, clipped_surrogate


def trrd_loss(
    *,
    student_logprobs: Tensor,
    old_logprobs: Tensor,
    teacher_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    alpha: float = 0.5,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    teacher_log_ratio_clip: float | None = 1.0,
    ratio_level: RatioLevel = "token",
    dual_clip: float | None = None,
    evidence_weight: float = 0.0,
    weight_clip: float = 0.2,
    contrast_clip: float = 2.0,
    teacher_speaks: Tensor | None = None,
    role_evidence: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the token loss of TRRD; see the formula above, with c = `teacher_log_ratio_clip`
    (None: no clamp).

    The ratio's denominator is the anchor πold^alpha πT^(1-alpha). `alpha` = 1 is GRPO; with 0 the
    anchor is the teacher alone. Where the clamp is active the gradient of log r_t is alpha times
    that of log πS, elsewhere 1 times.

    `teacher_speaks` [batch] bool marks the completions on which the teacher is used (None: all). On
    the others the loss is GRPO's.

    With `role_evidence` the advantage is Â w_t with the weights w_t of `srpo`, whose λ, ε_w and c
    are `evidence_weight`, `weight_clip` and `contrast_clip`; λ = 0 is TRRD without weights.

    Log-probs [batch, token] (only the student carries a gradient), `advantages` [batch] or [batch,
    token], `mask` [batch, token] bool. Returns the token loss [batch, token], 0 where masked, and
    stats of that shape: `ratio`, `gated_positive`, `gated_negative`, `clamped`,
    `log_ratio_to_teacher`, `dropped` (trained tokens with a non-finite log-prob, left out). Raises
    `ValueError` for alpha outside [0, 1].
    """
    if not 0 <= alpha <= 1:
        raise ValueError(
            f"alpha is {alpha}; it must be in [0, 1] (1 = GRPO, 0 = anchored to the teacher alone)."
        )
    kept, heard = keep_heard(
        mask,
        student_logprobs,
        old_logprobs,
        teacher_logprobs=teacher_logprobs,
        teacher_speaks=teacher_speaks,
    )
    student = clean(student_logprobs, kept)
    old = clean(old_logprobs, kept)

    # The clamp bounds the teacher's effect on the ratio of one token; c = inf is no clamp.
    log_ratio_to_teacher = clean(student, heard) - clean(teacher_logprobs, heard)
    c = float("inf") if teacher_log_ratio_clip is None else teacher_log_ratio_clip
    own_share: float | Tensor = alpha
    if teacher_speaks is not None:
        # Where the teacher is not used, the anchor is the old policy.
        own_share = torch.where(heard, torch.full_like(old, alpha), torch.ones_like(old))
    log_ratio = own_share * (student - old) + (1 - alpha) * log_ratio_to_teacher.clamp(-c, c)

    weighed_advantages, weighed = weighed_by_role(
        per_token(advantages, kept),
        role_evidence,
        kept,
        evidence_weight=evidence_weight,
        weight_clip=weight_clip,
        contrast_clip=contrast_clip,
    )
    token_loss, stats = clipped_surrogate(
        log_ratio,
        weighed_advantages,
        kept,
        clip_low=clip_low,
        clip_high=clip_high,
        level=ratio_level,
        dual_clip=dual_clip,
    )
    return token_loss, stats | weighed | {
        "log_ratio_to_teacher": log_ratio_to_teacher.detach(),
        "clamped": log_ratio_to_teacher.detach().abs() > c,
        "dropped": mask & ~kept,
    }
