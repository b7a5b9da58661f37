"""Reduce token losses to a scalar: the only place that divides.

    sequence_mean    1/G  sum_i 1/|y_i| sum_t loss_it    GRPO; Eq. 1 and 4 of arXiv 2602.22495
    token_mean       sum_it loss_it / sum_i |y_i|        DAPO, arXiv 2503.14476
    constant_length  sum_it loss_it / (G L)              Dr.GRPO, arXiv 2503.20783

G counts the rows with at least one masked token, |y_i| the masked tokens of a row, and L is
max_completion_tokens. When a batch is split into micro-batches, every part gets the denominator of
the *whole* batch. The sum of the parts is then the loss of the batch.
"""

from typing import Literal, get_args

from torch import Tensor

from rlad.objectives.masks import clean, masked_mean_of_rows

Aggregation = Literal["sequence_mean", "token_mean", "constant_length"]


def denominator(
    mask: Tensor, *, mode: Aggregation, max_completion_tokens: int | None = None
) -> float:
    """Return the denominator, at least 1, for the loss of a batch with this mask `[batch,
    token]`."""
    num_sequences = max(int(mask.any(dim=1).sum()), 1)
    if mode == "sequence_mean":
        return num_sequences
    if mode == "token_mean":
        return max(int(mask.sum()), 1)
    if mode == "constant_length" and max_completion_tokens is not None:
        return num_sequences * max_completion_tokens
    raise ValueError(
        f"aggregation mode {mode!r} has no denominator; use one of "
        f"{', '.join(get_args(Aggregation))}, the last with max_completion_tokens."
    )


def aggregate(
    token_loss: Tensor,
    mask: Tensor,
    *,
    mode: Aggregation,
    denominator: float | None = None,
    max_completion_tokens: int | None = None,
) -> Tensor:
    """Reduce `token_loss` [batch, token] to a scalar, over the tokens of `mask`.

    `denominator` is that of the whole batch if this is a micro-batch; None means that this is the
    whole batch.
    """
    if denominator is None:
        denominator = _denominator(mask, mode=mode, max_completion_tokens=max_completion_tokens)
    if mode == "sequence_mean":
        return masked_mean_of_rows(token_loss, mask).sum() / denominator
    return clean(token_loss, mask).sum() / denominator


_denominator = denominator  # `aggregate` has a parameter of the same name
