"""Divergences of whole distributions from hidden states, in tiles: no `[token, vocabulary]` tensor
in forward or backward."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlad.objectives.divergences import Divergence
from rlad.scoring.distributions import (
    Distributions,
    OutputGradient,
    TokenDistributions,
    logsumexp_of,
)
from rlad.scoring.tiles import tile_shape


def token_divergence(
    student: Distributions,
    teacher: TokenDistributions,
    divergence: Divergence,
    *,
    tile: tuple[int, int] | None = None,
) -> Tensor:
    """Compute the divergence of student and teacher at each token, `[N]`, float32 (float64 for
    float64 inputs).

    Both are over the same vocabulary; the hidden sizes may differ. Only the student gets a
    gradient. Logits exist for one tile of each at a time, as in `token_logprobs`.
    """
    assert (student.num_tokens, student.vocabulary) == (teacher.num_tokens, teacher.vocabulary)
    # About nine tensors of the size of a tile exist at once; for log-probs only, it is three.
    tile = tile or smaller_tile(student)
    return _TokenDivergence.apply(*student, teacher, divergence, tile)


def smaller_tile(of: Distributions) -> tuple[int, int]:
    """Return a tile for computations that hold three times as many tensors of its size as
    log-probs do."""
    num_tokens, num_entries = tile_shape(of.weight.device.type, of.num_tokens, of.vocabulary)
    return max(1, num_tokens // 3), num_entries


class _TokenDivergence(torch.autograd.Function):
    """A function that saves the log-sum-exps of each token and the sum of its slopes.

    The terms need both log-sum-exps, so forward goes over the tiles twice. Backward computes the
    slopes again: the gradient to a logit is slope - πS * sum of slopes.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *given, teacher, divergence, tile = arguments
        student = Distributions(*given)
        # First pass: the log-sum-exps, which all log-probs need.
        logsumexps = [logsumexp_of(each, tile) for each in (student, teacher)]
        total = torch.zeros_like(logsumexps[0])
        slope_sum = torch.zeros_like(logsumexps[0])
        # Second pass: each part's terms, and their slopes in the student's log-probs.
        for rows, parts in student.tiles(tile):
            for entries in parts:
                logprobs = _logprobs((student, teacher), logsumexps, rows, entries)
                terms, slopes = divergence(*logprobs)
                total[rows] += terms.sum(dim=-1)
                slope_sum[rows] += slopes.sum(dim=-1)
        ctx.save_for_backward(*given[:3], slope_sum, *logsumexps)
        ctx.readout = given[3:]
        ctx.teacher = teacher
        ctx.divergence = divergence
        ctx.tile = tile
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        *given, slope_sum, student_logsumexp, teacher_logsumexp = ctx.saved_tensors
        student = Distributions(*given, *ctx.readout)
        logsumexps = (student_logsumexp, teacher_logsumexp)
        gradient = OutputGradient(student, ctx.needs_input_grad[:3])
        for rows, parts in student.tiles(ctx.tile):
            upstream = grads[0][rows, None] * (student.scale / student.temperature)
            for entries in parts:
                logprobs = _logprobs((student, ctx.teacher), logsumexps, rows, entries)
                _, slopes = ctx.divergence(*logprobs)
                # One logit changes all log-probs of the token, hence the sum of the slopes.
                grad = (slopes - logprobs[0].exp() * slope_sum[rows, None]).mul_(upstream)
                # A token that the loss leaves out has no gradient, even if its divergence is
                # infinite.
                grad.masked_fill_(upstream == 0, 0)
                # The cap's slope needs the logits, which are log-probs plus log-sum-exp.
                slope = student.slope_of_cap(logprobs[0] + student_logsumexp[rows, None])
                gradient.add(rows, entries, grad if slope is None else grad.mul_(slope))
        return (*gradient.for_autograd(), *(None,) * 7)


def _logprobs(
    both: tuple[Distributions, TokenDistributions],
    logsumexps: tuple[Tensor, Tensor] | list[Tensor],
    rows: slice,
    entries: slice,
) -> list[Tensor]:
    """Return the log-probs of a tile under each of two distributions."""
    return [
        each.logits(rows, entries).sub_(logsumexp[rows, None])
        for each, logsumexp in zip(both, logsumexps, strict=True)
    ]
