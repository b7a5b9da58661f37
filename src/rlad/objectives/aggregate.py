"""From token losses to a scalar: the one place that divides.

    sequence_mean    1/G  sum_i 1/|y_i| sum_t loss_it      (GRPO; Eq. 1 and 4 of arXiv 2602.22495)
    token_mean       sum_it loss_it / sum_i |y_i|          (DAPO, arXiv 2503.14476)
    constant_length  sum_it loss_it / (G L)                (Dr.GRPO, arXiv 2503.20783; L = max_completion_tokens)

G counts the rows with at least one masked token, |y_i| the masked tokens of a row. A batch that is
split into micro-batches passes the denominator of the *whole* batch to every part; the sum of the
parts is then the loss of the batch.
"""

from typing import Literal, get_args

from torch import Tensor

from rlad.objectives.masks import clean, masked_mean_of_rows

Aggregation = Literal["sequence_mean", "token_mean", "constant_length"]


def denominator(
    mask: Tensor, *, mode: Aggregation, max_completion_tokens: int | None = None
) -> float:
    """The number that the loss of a batch with this mask `[batch, token]` is divided by (at least
    1)."""
    num_sequences, num_tokens = int(mask.any(dim=1).sum()), int(mask.sum())
    match mode:
        case "sequence_mean":
            return max(num_sequences, 1)
        case "token_mean":
            return max(num_tokens, 1)
        case "constant_length":
            if max_completion_tokens is None:
                raise ValueError(
                    "mode 'constant_length' needs max_completion_tokens, the constant it divides "
                    "by."
                )
            return max(num_sequences, 1) * max_completion_tokens
        case _:
            raise ValueError(
                f"aggregation mode {mode!r} is unknown; use one of "
                f"{', '.join(get_args(Aggregation))}."
            )


def aggregate(
    token_loss: Tensor,
    mask: Tensor,
    *,
    mode: Aggregation,
    denominator: float | None = None,
    max_completion_tokens: int | None = None,
) -> Tensor:
    """The scalar loss of `token_loss` [batch, token] over the tokens of `mask`.

    `denominator` is that of the whole batch when this is a part of it; None takes this batch as the
    whole.
    """
    if denominator is None:
        denominator = _denominator(mask, mode=mode, max_completion_tokens=max_completion_tokens)
    total = (
        masked_mean_of_rows(token_loss, mask)
        if mode == "sequence_mean"
        else clean(token_loss, mask)
    )
    return total.sum() / denominator


_denominator = denominator  # `aggregate` has a parameter of the same name
