"""RLSD: the teacher's evidence weights each token's advantage (arXiv 2604.03128).

w_t    = exp( sign(Â) (log πT - log πold) )        (constant)
A_t    = Â [ (1 - λ) + λ clip(w_t, 1 - ε_w, 1 + ε_w) ]
loss_t = GRPO loss_t with the advantage A_t
"""

import torch
from torch import Tensor

from rlad.objectives.evidence import evidence_ratio
from rlad.objectives.grpo import grpo_loss
from rlad.objectives.masks import clean, keep_heard, per_token


def rlsd_loss(
    *,
    student_logprobs: Tensor,
    old_logprobs: Tensor,
    teacher_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    teacher_weight: float = 0.5,
    weight_clip: float = 0.2,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    teacher_speaks: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the token loss of RLSD; see the formula above, with λ = `teacher_weight` and ε_w =
    `weight_clip`.

    The weight is positive: the teacher changes how much a token counts, never the sign of its
    advantage. λ = 0 is GRPO.

    `teacher_speaks` [batch] bool marks the completions on which the teacher is used (None: all). On
    the others the weight is 1, which is GRPO.

    Log-probs [batch, token] (only the student carries a gradient), `advantages` [batch] or [batch,
    token], `mask` [batch, token] bool. Returns the token loss [batch, token], 0 where masked, and
    the stats of GRPO with `log_ratio_to_teacher` and `advantage_weight`. Raises `ValueError` for λ
    or ε_w outside [0, 1].
    """
    if not (0 <= teacher_weight <= 1 and 0 <= weight_clip <= 1):
        raise ValueError(
            f"teacher_weight is {teacher_weight} and weight_clip {weight_clip}; both must be in "
            "[0, 1]."
        )
    kept, heard = keep_heard(
        mask,
        student_logprobs,
        old_logprobs,
        teacher_logprobs=teacher_logprobs,
        teacher_speaks=teacher_speaks,
    )
    old = clean(old_logprobs, heard).detach()
    teacher = clean(teacher_logprobs, heard).detach()
    per_token_advantages = per_token(advantages, kept)

    # Bounding before exp does not change the result, since 1 + weight_clip < e.
    ratio = evidence_ratio(per_token_advantages, teacher - old, most=1.0)
    evidence = ratio.clamp(1 - weight_clip, 1 + weight_clip)
    weight = torch.lerp(torch.ones_like(evidence), evidence, teacher_weight)

    token_loss, stats = grpo_loss(
        student_logprobs=student_logprobs,
        old_logprobs=old_logprobs,
        advantages=per_token_advantages * weight,
        mask=kept,
        clip_low=clip_low,
        clip_high=clip_high,
    )
    return token_loss, stats | {
        "log_ratio_to_teacher": clean(student_logprobs, heard).detach() - teacher,
        "advantage_weight": weight,
        "dropped": mask & ~kept,
    }
