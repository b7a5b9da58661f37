"""Log-probs and divergences over the most likely entries of each token, with the rest merged into
one outcome (the tail), from hidden states in tiles."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlad.objectives.divergences import Divergence
from rlad.scoring.distributions import (
    Distributions,
    OutputGradient,
    TokenDistributions,
    tiles_of,
)
from rlad.scoring.token_divergence import smaller_tile


@torch.no_grad()
def likeliest(distributions: TokenDistributions, top_k: int, *, tile: tuple[int, int]) -> Tensor:
    """Return the ids of the `top_k` most likely entries of each token, `[N, top_k]`."""
    found = []
    for rows, parts in tiles_of(distributions, tile):
        best: Tensor | None = None
        ids: Tensor | None = None
        # Merge the best of each part with the best so far.
        for entries in parts:
            logits = distributions.logits(rows, entries)
            values, places = logits.topk(min(top_k, logits.shape[1]), dim=1)
            places = places + entries.start
            if best is not None and ids is not None:
                values = torch.cat([best, values], dim=1)
                places = torch.cat([ids, places], dim=1)
            best, order = values.topk(min(top_k, values.shape[1]), dim=1)
            ids = places.gather(1, order)
        assert ids is not None
        found.append(ids)
    return torch.cat(found) if found else torch.empty(0, top_k, dtype=torch.int64)


@torch.no_grad()
def column_logprobs(
    distributions: TokenDistributions, ids: Tensor, *, tile: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Return the log-probs of the entries `ids` [N, K] of each token and of all others merged (the
    tail), `[N, K + 1]`, and the log-sum-exp of the logits, `[N]`.

    The tail is summed from its own entries, not subtracted from 1, so it is accurate however small
    it is.
    """
    columns = torch.full(
        (len(ids), ids.shape[1] + 1), -torch.inf, dtype=distributions.dtype, device=ids.device
    )
    logsumexp = columns.new_empty(len(ids))
    for rows, parts in tiles_of(distributions, tile):
        tails: list[Tensor] = []
        for entries in parts:
            logits = distributions.logits(rows, entries)
            at, column, place = _entries_here(ids[rows], entries)
            columns[rows][at, column] = logits[at, place]
            logits[at, place] = -torch.inf
            tails.append(logits.logsumexp(dim=-1))
        columns[rows, -1] = torch.stack(tails).logsumexp(dim=0)
        logsumexp[rows] = columns[rows].logsumexp(dim=-1)
    return columns.sub_(logsumexp[:, None]), logsumexp


def top_k_divergence(
    student: Distributions,
    teacher: TokenDistributions,
    divergence: Divergence,
    *,
    top_k: int,
    chosen_by: TokenDistributions,
    tile: tuple[int, int] | None = None,
) -> Tensor:
    """Compute the divergence at each token, `[N]`, over K + 1 outcomes: the `top_k` most likely
    entries under `chosen_by` (student or teacher), and all others.

    Only the student gets a gradient. If K is the whole vocabulary, it equals `token_divergence`.
    """
    tile = tile or smaller_tile(student)
    ids = likeliest(chosen_by, top_k, tile=tile)
    columns, _ = column_logprobs(teacher, ids, tile=tile)
    return column_divergence(student, ids, columns, divergence, tile=tile)


def column_divergence(
    student: Distributions,
    ids: Tensor,
    teacher_columns: Tensor,
    divergence: Divergence,
    *,
    tile: tuple[int, int] | None = None,
) -> Tensor:
    """Compute the divergence at each token, `[N]`, over the outcomes `ids` [N, K] and their tail,
    given the teacher's log-probs of them, `[N, K + 1]`."""
    tile = tile or smaller_tile(student)
    return _ColumnDivergence.apply(*student, ids, teacher_columns, divergence, tile)


class _ColumnDivergence(torch.autograd.Function):
    """A function that saves the slopes of each token's outcomes and the log-sum-exp.

    An outcome o of probability P_o has the gradient slope_o ∇log P_o. So an entry v of the ids gets
    slope_v, one of the tail slope_tail πS(v) / P_tail, and each of them -πS(v) * sum of slopes. In
    the tail both are multiples of πS(v) / P_tail, which is at most 1 however small P_tail is.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *given, ids, teacher_columns, divergence, tile = arguments
        student = Distributions(*given)
        columns, logsumexp = column_logprobs(student, ids, tile=tile)
        teacher_columns = teacher_columns.to(columns)
        terms, slopes = divergence(columns, teacher_columns)
        tail = columns[:, -1]
        of_tail = slopes[:, -1] - tail.exp() * slopes.sum(dim=-1)
        # The log-sum-exp of the tail's own logits; an empty tail has no entry that needs it.
        of_others = torch.where(tail == -torch.inf, 0, tail) + logsumexp
        ctx.save_for_backward(*given[:3], ids, slopes, logsumexp, of_tail, of_others)
        ctx.readout = given[3:]
        ctx.tile = tile
        return terms.sum(dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        *given, ids, slopes, logsumexp, of_tail, of_others = ctx.saved_tensors
        student = Distributions(*given, *ctx.readout)
        gradient = OutputGradient(student, ctx.needs_input_grad[:3])
        slope_sum = slopes.sum(dim=-1)
        for rows, parts in student.tiles(ctx.tile):
            upstream = grads[0][rows, None] * (student.scale / student.temperature)
            for entries in parts:
                logits = student.logits(rows, entries)
                slope = student.slope_of_cap(logits)
                at, column, place = _entries_here(ids[rows], entries)
                here = (logits[at, place] - logsumexp[rows][at]).exp()
                grad = logits.sub_(of_others[rows, None]).exp_().mul_(of_tail[rows, None])
                grad[at, place] = slopes[rows][at, column] - here * slope_sum[rows][at]
                grad = grad.mul_(upstream)
                # A token that the loss leaves out has no gradient, even if its divergence is
                # infinite.
                grad.masked_fill_(upstream == 0, 0)
                gradient.add(rows, entries, grad if slope is None else grad.mul_(slope))
        return (*gradient.for_autograd(), *(None,) * 8)


def _entries_here(ids: Tensor, entries: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Return token, column and index in the part for all ids `[token, column]` in a part of the
    vocabulary."""
    at, column = ((ids >= entries.start) & (ids < entries.stop)).nonzero(as_tuple=True)
    return at, column, ids[at, column] - entries.start
