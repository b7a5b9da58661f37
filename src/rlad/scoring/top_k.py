"""The likeliest entries of each token and the rest as one outcome (the tail): their log-probs, and
divergences over them, from hidden states in tiles."""

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
    """Return the ids of the `top_k` likeliest entries of each token, `[N, top_k]`."""
    found = []
    for rows, parts in tiles_of(distributions, tile):
        best: Tensor | None = None
        ids: Tensor | None = None
        # The best of each part join the best so far.
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
    """Return the log-probs of the entries `ids` [N, K] of each token and of all others together
    (the tail), `[N, K + 1]`, and the log-sum-exp of the logits, `[N]`.

    The tail is summed from its own entries, not taken from 1: it is right however small it is.
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
    """Compute the divergence at each token, `[N]`, of K + 1 outcomes: the `top_k` entries that are
    likeliest under `chosen_by` (student or teacher), and all others.

    The gradient goes to the student alone. Where K is the whole vocabulary, it is
    `token_divergence`.
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
    """Compute the divergence at each token, `[N]`, of the outcomes `ids` [N, K] and their tail,
    given the teacher's log-probs of them, `[N, K + 1]`."""
    tile = tile or smaller_tile(student)
    return _ColumnDivergence.apply(*student, ids, teacher_columns, divergence, tile)


class _ColumnDivergence(torch.autograd.Function):
    """Keeps the slopes of the outcomes of each token and the log-sum-exp.

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
        # The log-sum-exp of the tail's own logits; a tail of nothing has no entry that needs it.
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
                # A token that the loss leaves out has no gradient, be its divergence infinite.
                grad.masked_fill_(upstream == 0, 0)
                gradient.add(rows, entries, grad if slope is None else grad.mul_(slope))
        return (*gradient.for_autograd(), *(None,) * 8)


def _entries_here(ids: Tensor, entries: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Return of all ids `[token, column]` in a part of the vocabulary the token, the column and the
    place in the part."""
    at, column = ((ids >= entries.start) & (ids < entries.stop)).nonzero(as_tuple=True)
    return at, column, ids[at, column] - entries.start
