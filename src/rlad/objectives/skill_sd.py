"""Skill-SD, self-distillation from a teacher that is shown a skill (arXiv 2604.10674).

loss_t = GRPO loss_t + kd_coef rho_t (e^-l_t - 1 + l_t)
l_t    = log πS - log πT, bounded to [-c, c]
rho_t  = πS / πold, at most max_importance_weight; it carries the gradient, which is rho_t l_t

πT is the student at the iteration's start, with a skill in its prompt; the student never sees one.
"""

from torch import Tensor

from rlad.objectives.grpo import grpo_loss
from rlad.objectives.masks import bounded_exp, clean, keep_heard


def skill_sd_loss(
    *,
    student_logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    teacher_logprobs: Tensor,
    teacher_speaks: Tensor | None = None,
    kd_coef: float = 1e-3,
    teacher_log_ratio_clip: float | None = 5.0,
    max_importance_weight: float | None = 2.0,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the token loss of Skill-SD; see the formula above. Its gradient to log πS is GRPO's
    plus kd_coef rho_t l_t, which in expectation over πold is that of the reverse KL.

    The paper bounds neither l nor rho; None is no bound. Beyond a bound the gradient is that at the
    bound, not 0, so that a token that the teacher finds much more likely is still pushed up.
    `teacher_speaks` [batch] bool marks the completions on which the teacher is used (None: all). On
    the others the second term is left out.

    Log-probs [batch, token] (only the student carries a gradient), `advantages` [batch] or [batch,
    token], `mask` [batch, token] bool. Returns the token loss [batch, token], 0 where masked, and
    the stats of GRPO with `log_ratio_to_teacher`, `kl_to_teacher` (its estimate e^-l - 1 + l),
    `clamped` (where l is bounded) and `importance_weight`.
    """
    kept, heard = keep_heard(
        mask,
        student_logprobs,
        old_logprobs,
        teacher_logprobs=teacher_logprobs,
        teacher_speaks=teacher_speaks,
    )
    token_loss, stats = grpo_loss(
        student_logprobs=student_logprobs,
        old_logprobs=old_logprobs,
        advantages=advantages,
        mask=kept,
        clip_low=clip_low,
        clip_high=clip_high,
    )
    student = clean(student_logprobs, heard)
    log_ratio = student.detach() - clean(teacher_logprobs, heard)
    bounded = log_ratio
    if teacher_log_ratio_clip is not None:
        bounded = log_ratio.clamp(-teacher_log_ratio_clip, teacher_log_ratio_clip)
    weight = bounded_exp(student.detach() - clean(old_logprobs, heard))
    if max_importance_weight is not None:
        weight = weight.clamp(max=max_importance_weight)
    kl = bounded_exp(-bounded) - 1 + bounded
    # The value is rho (e^-l - 1 + l). The added term has the value 0 and the gradient rho l, with l
    # bounded.
    distillation = weight * (kl + bounded * (student - student.detach()))
    return token_loss + kd_coef * clean(distillation, heard), stats | {
        "log_ratio_to_teacher": log_ratio,
        "kl_to_teacher": clean(kl, heard),
        "clamped": heard & (bounded != log_ratio),
        "importance_weight": weight,
        "dropped": mask & ~kept,
    }
