"""The loss that `sdpo`, `mopd` and `opsd` share: a divergence to a teacher, usually the student
itself with more information in its prompt."""

from torch import Tensor

from rlad.objectives.masks import bounded_exp, clean, keep_heard


def distillation_loss(
    *,
    student_logprobs: Tensor,
    old_logprobs: Tensor,
    mask: Tensor,
    divergence_to_teacher: Tensor,
    max_importance_weight: float | None,
    teacher_speaks: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute min(πS / πold, bound) D at each token, 0 where the teacher is not used. The weight
    carries no gradient, and is 1 if the student was not updated since it sampled."""
    kept, heard = keep_heard(
        mask,
        student_logprobs,
        old_logprobs,
        teacher_logprobs=divergence_to_teacher,
        teacher_speaks=teacher_speaks,
    )
    log_ratio = clean(student_logprobs, kept).detach() - clean(old_logprobs, kept)
    weight = bounded_exp(log_ratio)
    if max_importance_weight is not None:
        weight = weight.clamp(max=max_importance_weight)
    divergence = clean(divergence_to_teacher, heard)
    return weight * divergence, {
        "divergence_to_teacher": divergence.detach(),
        "importance_weight": weight,
        "dropped": mask & ~kept,
    }
