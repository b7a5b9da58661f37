"""Log-probs of given tokens from hidden states, in tiles: no `[token, vocabulary]` tensor in
forward or backward."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlad.scoring.distributions import Distributions, OutputGradient, float32_or_wider
from rlad.scoring.tiles import tile_shape


def token_logprobs(
    distributions: Distributions,
    token_ids: Tensor,
    *,
    with_entropy: bool = True,
    tile: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the log-probs of given tokens, and the entropy of their distributions (no gradient).

    `token_ids` [N]; an id outside the vocabulary gives NaN. Returns two float32 tensors [N]
    (float64 for float64 inputs). Without entropy, which costs half of the forward pass, the second
    is NaN. In forward and backward, logits exist for one tile of `tile` = (tokens, vocabulary
    entries) at a time, by default as many as `LOGITS_PER_TILE` allows. So memory grows neither with
    N nor with the vocabulary, except for the gradient of `weight`.
    """
    weight = distributions.weight
    if tile is None:
        tile = tile_shape(weight.device.type, len(token_ids), len(weight))
    return _TokenLogprobs.apply(*distributions, token_ids, with_entropy, tile)


class _TokenLogprobs(torch.autograd.Function):
    """A function that saves the log-sum-exp of each token. Backward recomputes the softmax by tile.

    Of tiles with log-sum-exps l_k and entropies H_k: l = logsumexp_k l_k, H = sum_k w_k (H_k - log
    w_k), w_k = exp(l_k - l). With x = hidden @ weight.T + bias and c = capped(scale x): d log p(y)
    / dx = (onehot(y) - softmax(c / temperature)) / temperature * (1 - (c / soft_cap)^2) * scale.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        *given, token_ids, with_entropy, tile = arguments
        distributions = Distributions(*given)
        hidden = distributions.hidden
        dtype = float32_or_wider(hidden.dtype)
        logprobs, logsumexp, entropy = (
            hidden.new_full((len(hidden),), torch.nan, dtype=dtype) for _ in range(3)
        )
        for rows, parts in distributions.tiles(tile):
            # From each part of the vocabulary: the logit of the wanted token, if it is there, and
            # the part's log-sum-exp and entropy.
            of_tiles: list[Tensor] = []
            entropies: list[Tensor] = []
            for entries in parts:
                logits = distributions.logits(rows, entries)
                is_here, places = _places(token_ids[rows], entries)
                chosen = logits.gather(1, places[:, None]).squeeze(1)
                logprobs[rows] = torch.where(is_here, chosen, logprobs[rows])
                of_tiles.append(logits.logsumexp(dim=-1))
                if with_entropy:
                    entropies.append(_entropy(logits, of_tiles[-1]))
            # Combine the parts: each has the probability exp(share).
            stacked = torch.stack(of_tiles)
            logsumexp[rows] = stacked.logsumexp(dim=0)
            logprobs[rows] -= logsumexp[rows]
            if with_entropy:
                shares = stacked - logsumexp[rows]
                # A part of probability 0 has the share -inf; clamped, it adds 0 and not NaN.
                surprises = torch.stack(entropies) - shares.clamp(min=torch.finfo(dtype).min)
                entropy[rows] = (shares.exp() * surprises).sum(dim=0)
        ctx.save_for_backward(*given[:3], token_ids, logsumexp)
        ctx.readout = given[3:]
        ctx.tile = tile
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        *given, token_ids, logsumexp = ctx.saved_tensors
        distributions = Distributions(*given, *ctx.readout)
        gradient = OutputGradient(distributions, ctx.needs_input_grad[:3])
        for rows, parts in distributions.tiles(ctx.tile):
            # Scale and temperature are constant factors, so they are applied once per token.
            upstream = grads[0][rows, None] * (distributions.scale / distributions.temperature)
            for entries in parts:
                logits = distributions.logits(rows, entries)
                # Read from the logits before they are overwritten.
                slope = distributions.slope_of_cap(logits)
                is_here, places = _places(token_ids[rows], entries)
                # (onehot - softmax) * upstream, written over the logits
                grad = logits.sub_(logsumexp[rows, None]).exp_().mul_(-upstream)
                grad.scatter_add_(1, places[:, None], upstream * is_here[:, None])
                gradient.add(rows, entries, grad if slope is None else grad.mul_(slope))
        return (*gradient.for_autograd(), *(None,) * 7)


def _places(token_ids: Tensor, entries: slice) -> tuple[Tensor, Tensor]:
    """Return which tokens are among these entries of the vocabulary, and their indices there
    (arbitrary for the others), both `[token]`."""
    places = token_ids - entries.start
    last = entries.stop - entries.start - 1
    return (places >= 0) & (places <= last), places.clamp(0, last)


def _entropy(logits: Tensor, logsumexp: Tensor) -> Tensor:
    """Return -sum_v p_v log p_v, `[token]`, p = softmax(logits). Overwrites the logits."""
    lowest = torch.finfo(logits.dtype).min
    logprobs = logits.sub_(logsumexp.clamp(min=lowest)[:, None])
    return -torch.linalg.vecdot(logprobs.exp(), logprobs.clamp_(min=lowest))
