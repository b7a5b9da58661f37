"""SFT, supervised fine-tuning on what the teacher writes (arXiv 1606.07947).

loss_t = -log πS    of the teacher's token
"""

from torch import Tensor

from rlad.objectives.masks import clean, keep_finite


def sft_loss(*, student_logprobs: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the token loss of SFT; see the formula above.

    `student_logprobs` [batch, token] are for the teacher's tokens, `mask` [batch, token] bool.
    Returns the token loss [batch, token], 0 where masked, and the stat `dropped` of that shape
    (trained tokens with a non-finite log-prob, left out).
    """
    kept = keep_finite(mask, student_logprobs)
    return -clean(student_logprobs, kept), {"dropped": mask & ~kept}
