"""GKD, generalised knowledge distillation on the student's own completions (arXiv 2306.13649).

loss_t = beta KL(πT || m) + (1 - beta) KL(πS || m)    over the vocabulary at token t
m      = beta πT + (1 - beta) πS                      beta = 0: KL(πT || πS), 1: KL(πS || πT)
"""

from torch import Tensor

from rlad.objectives.masks import clean, keep_finite


def gkd_loss(*, divergence_to_teacher: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the token loss of GKD; see the formula above, and `rlad.objectives.divergences` for
    the divergence.

    `divergence_to_teacher` [batch, token] is the divergence of the two distributions at each token,
    with gradient to the student; `mask` [batch, token] bool. Returns the token loss [batch, token],
    0 where masked, and stats of that shape: `divergence_to_teacher`, `dropped` (trained tokens with
    a non-finite divergence, left out).
    """
    kept = keep_finite(mask, divergence_to_teacher)
    loss = clean(divergence_to_teacher, kept)
    return loss, {"divergence_to_teacher": loss.detach(), "dropped": mask & ~kept}
