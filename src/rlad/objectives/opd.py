"""OPD, on-policy distillation (Qwen3, arXiv 2505.09388; Thinking Machines, 2025).

A_t    = log πT - log πold        (constant; no reward)
loss_t = -exp(log πS - log πold) A_t
"""

from torch import Tensor

from rlad.objectives.masks import bounded_exp, clean, keep_finite


def opd_loss(
    *, student_logprobs: Tensor, old_logprobs: Tensor, teacher_logprobs: Tensor, mask: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the token loss of on-policy distillation; see the formula above.

    At πS = πold its expected gradient is that of the reverse KL(πS || πT) per token. Log-probs
    [batch, token] (only the student carries a gradient), `mask` [batch, token] bool. Returns the
    token loss [batch, token], 0 where masked, and stats of that shape: `ratio`,
    `log_ratio_to_teacher`, `dropped` (trained tokens with a non-finite log-prob, left out).
    """
    kept = keep_finite(mask, student_logprobs, old_logprobs, teacher_logprobs)
    student, old, teacher = (
        clean(x, kept) for x in (student_logprobs, old_logprobs, teacher_logprobs)
    )
    # The advantage is constant, so the gradient is the policy gradient of A_t.
    ratio = bounded_exp(student - old.detach())
    return -clean(ratio * (teacher - old).detach(), kept), {
        "ratio": ratio.detach(),
        "log_ratio_to_teacher": (student - teacher).detach(),
        "dropped": mask & ~kept,
    }
