"""Log-probs of given tokens from hidden states, in tiles: no `[token, vocabulary]` forward or
backward."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlad.scoring.tiles import tile_shape


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    *,
    scale: float = 1.0,
    soft_cap: float | None = None,
    temperature: float = 1.0,
    with_entropy: bool = True,
    weight_grad: Tensor | None = None,
    tile: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probs of given tokens under softmax(logits), and the entropy (no gradient).

    logits = capped(scale (hidden @ weight.T + bias)) / temperature,    capped(z) = soft_cap tanh(z / soft_cap)

    Without `soft_cap` capped(z) = z. `hidden` [N, hidden_size]; `weight` [vocabulary, hidden_size]
    and `bias` [vocabulary] are rounded to its type; `token_ids` [N], one outside of the vocabulary
    has NaN. Returns two float32 tensors [N] (float64 for float64 inputs); without entropy, which
    costs half of the forward pass, the second is NaN. Logits exist for one tile of `tile` =
    (tokens, vocabulary entries) at a time, forward and backward, by default as many as
    `LOGITS_PER_TILE` allows: memory grows neither with N nor with the vocabulary, but for the
    gradient of `weight`. Where `weight_grad` is given, that is added to it in place, and autograd
    is given none.
    """
    if tile is None:
        tile = tile_shape(weight.device.type, len(token_ids), len(weight))
    transform = _Transform(scale, soft_cap, temperature)
    return _TokenLogprobs.apply(
        hidden, weight, bias, token_ids, transform, with_entropy, weight_grad, tile
    )


class _Transform(NamedTuple):
    scale: float
    soft_cap: float | None
    temperature: float


class _TokenLogprobs(torch.autograd.Function):
    """Keeps the log-sum-exp of each token; backward recomputes the softmax tile by tile.

    Of tiles with log-sum-exps l_k and entropies H_k: l = logsumexp_k l_k, H = sum_k w_k (H_k - log
    w_k), w_k = exp(l_k - l). With x = hidden @ weight.T + bias and c = capped(scale x): d log p(y)
    / dx = (onehot(y) - softmax(c / temperature)) / temperature * (1 - (c / soft_cap)^2) * scale.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        token_ids: Tensor,
        transform: _Transform,
        with_entropy: bool,
        weight_grad: Tensor | None,
        tile: tuple[int, int],
    ) -> tuple[Tensor, Tensor]:
        dtype = float32_or_wider(hidden.dtype)
        logprobs, logsumexp, entropy = (
            hidden.new_full((len(hidden),), torch.nan, dtype=dtype) for _ in range(3)
        )
        for rows in _parts(len(hidden), tile[0]):
            of_tiles: list[Tensor] = []
            entropies: list[Tensor] = []
            for entries in _parts(len(weight), tile[1]):
                logits = output_logits(
                    hidden[rows], weight[entries], _part_of(bias, entries), *transform
                )
                is_here, places = _places(token_ids[rows], entries)
                chosen = logits.gather(1, places[:, None]).squeeze(1)
                logprobs[rows] = torch.where(is_here, chosen, logprobs[rows])
                of_tiles.append(logits.logsumexp(dim=-1))
                if with_entropy:
                    entropies.append(_entropy(logits, of_tiles[-1]))
            stacked = torch.stack(of_tiles)
            logsumexp[rows] = stacked.logsumexp(dim=0)
            logprobs[rows] -= logsumexp[rows]
            if with_entropy:
                shares = stacked - logsumexp[rows]
                surprises = torch.stack(entropies) - shares.clamp(min=torch.finfo(dtype).min)
                entropy[rows] = (shares.exp() * surprises).sum(dim=0)
        ctx.save_for_backward(hidden, weight, bias, token_ids, logsumexp)
        ctx.transform, ctx.tile, ctx.weight_grad = transform, tile, weight_grad
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, token_ids, logsumexp = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        wide = logsumexp.dtype
        grad_hidden = torch.zeros_like(hidden, dtype=wide) if wants_hidden else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if wants_bias else None
        grad_weight = ctx.weight_grad
        if wants_weight and grad_weight is None:
            grad_weight = torch.zeros_like(weight, dtype=wide)
        for rows in _parts(len(hidden), ctx.tile[0]):
            for entries in _parts(len(weight), ctx.tile[1]):
                logits = output_logits(
                    hidden[rows], weight[entries], _part_of(bias, entries), *ctx.transform
                )
                tokens = _places(token_ids[rows], entries)
                grad_logits = _grad_logits(
                    logits, logsumexp[rows], grads[0][rows], tokens, ctx.transform
                )
                if grad_bias is not None:
                    grad_bias[entries] += grad_logits.sum(dim=0)
                grad_logits = grad_logits.to(hidden.dtype)
                if grad_hidden is not None:
                    _add_product(grad_hidden[rows], grad_logits, weight[entries].to(hidden.dtype))
                if grad_weight is not None:
                    _add_product(grad_weight[entries], grad_logits.T, hidden[rows])
        return (
            None if grad_hidden is None else grad_hidden.to(hidden.dtype),
            None
            if grad_weight is None or ctx.weight_grad is not None
            else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            *(None,) * 5,
        )


def _grad_logits(
    logits: Tensor,
    logsumexp: Tensor,
    grad_logprobs: Tensor,
    tokens: tuple[Tensor, Tensor],
    transform: _Transform,
) -> Tensor:
    """The gradient with regard to hidden @ weight.T + bias of a tile, `[token, entry]`, in the
    place of its logits."""
    scale, soft_cap, temperature = transform
    slope = (
        None if soft_cap is None else (logits * (temperature / soft_cap)).square_().neg_().add_(1)
    )
    upstream = grad_logprobs[:, None] * (scale / temperature)
    is_here, places = tokens
    grad = logits.sub_(logsumexp[:, None]).exp_().mul_(-upstream)
    grad.scatter_add_(1, places[:, None], upstream * is_here[:, None])
    return grad if slope is None else grad.mul_(slope)


def _parts(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def _part_of(bias: Tensor | None, entries: slice) -> Tensor | None:
    return None if bias is None else bias[entries]


def _places(token_ids: Tensor, entries: slice) -> tuple[Tensor, Tensor]:
    """Which tokens are among these entries of the vocabulary, and where; an arbitrary place for the
    others. Both `[token]`."""
    places = token_ids - entries.start
    last = entries.stop - entries.start - 1
    return (places >= 0) & (places <= last), places.clamp(0, last)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, in the type of `total`."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


@torch.no_grad()
def output_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: float,
    soft_cap: float | None,
    temperature: float,
) -> Tensor:
    """The logits of `token_logprobs`, `[N, vocabulary]`, float32 (float64 for float64 inputs),
    without gradient."""
    bias = None if bias is None else bias.to(hidden.dtype)
    logits = torch.nn.functional.linear(hidden, weight.to(hidden.dtype), bias)
    logits = logits.to(float32_or_wider(logits.dtype))
    if scale != 1:
        logits.mul_(scale)
    if soft_cap is not None:
        logits.div_(soft_cap).tanh_().mul_(soft_cap)
    return logits.div_(temperature)


def _entropy(logits: Tensor, logsumexp: Tensor) -> Tensor:
    """-sum_v p_v log p_v, `[token]`, p = softmax(logits). Overwrites the logits."""
    lowest = torch.finfo(logits.dtype).min
    logprobs = logits.sub_(logsumexp.clamp(min=lowest)[:, None])
    return -torch.linalg.vecdot(logprobs.exp(), logprobs.clamp_(min=lowest))


def float32_or_wider(dtype: torch.dtype) -> torch.dtype:
    """The type in which log-probs of logits of this type are computed."""
    return torch.float64 if dtype == torch.float64 else torch.float32
