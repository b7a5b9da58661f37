"""The only numerics helpers: selecting with a mask, and log-probs of given tokens without `[batch, token, vocabulary]`."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlad.chunk_sizes import tokens_per_chunk


def keep_finite(mask: Tensor, *values: Tensor) -> Tensor:
    """The tokens of `mask` at which every one of `values` is finite. All tensors `[batch, token]`."""
    for value in values:
        mask = mask & torch.isfinite(value.detach())
    return mask


def clean(values: Tensor, mask: Tensor) -> Tensor:
    """`values` where `mask` holds, 0 elsewhere; nothing outside the mask reaches value or gradient, be it NaN."""
    return torch.where(mask, values, torch.zeros_like(values))


def per_token(advantages: Tensor, mask: Tensor) -> Tensor:
    """Advantages `[batch]` or `[batch, token]` as `[batch, token]`, 0 outside the mask."""
    wide = advantages[:, None].expand(mask.shape) if advantages.dim() == 1 else advantages
    return clean(wide, mask)


def masked_mean_of_rows(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the masked tokens of each row, `[batch, 1]`; 0 for a row without any."""
    return clean(values, mask).sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)


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
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probs of given tokens under softmax(logits), and the entropy (no gradient).

    logits = capped(scale (hidden @ weight.T + bias)) / temperature,    capped(z) = soft_cap tanh(z / soft_cap)

    Without `soft_cap` capped(z) = z. `hidden` [N, hidden_size], `weight` [vocabulary, hidden_size], `token_ids` [N]; returns
    two float32 tensors [N] (float64 for float64 inputs); without entropy, which costs half of the time, the second is NaN.
    Logits exist for `chunk_tokens` tokens at a time, forward and backward, by default as many as `LOGITS_PER_CHUNK` allows:
    memory grows neither with N nor with the vocabulary.
    """
    if chunk_tokens is None:
        chunk_tokens = default_chunk_tokens(weight)
    transform = (scale, soft_cap, temperature)
    return _TokenLogprobs.apply(hidden, weight, bias, token_ids, transform, with_entropy, chunk_tokens)


def default_chunk_tokens(weight: Tensor) -> int:
    """Tokens whose logits, `[token, vocabulary]`, are held at once for an output layer `[vocabulary, hidden_size]`."""
    return tokens_per_chunk(weight.device.type, weight.shape[0])


class _TokenLogprobs(torch.autograd.Function):
    """Keeps the log-sum-exp of each token; backward recomputes the softmax chunk by chunk.

    With x = hidden @ weight.T + bias and c = capped(scale x):
    d log p(y) / dx = (onehot(y) - softmax(c / temperature)) / temperature * (1 - (c / soft_cap)^2) * scale.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        token_ids: Tensor,
        transform: tuple[float, float | None, float],
        with_entropy: bool,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        for rows, ids in zip(hidden.split(chunk), token_ids.split(chunk), strict=True):
            logits = output_logits(rows, weight, bias, *transform)
            logsumexp = logits.logsumexp(dim=-1)
            chosen = logits.gather(1, ids[:, None]).squeeze(1)
            entropy = _entropy(logits, logsumexp) if with_entropy else torch.full_like(logsumexp, torch.nan)
            parts.append((chosen - logsumexp, logsumexp, entropy))
        logprobs, logsumexp, entropy = (torch.cat(column) for column in zip(*parts, strict=True))
        ctx.save_for_backward(hidden, weight, bias, token_ids, logsumexp)
        ctx.transform, ctx.chunk = transform, chunk
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, token_ids, logsumexp = ctx.saved_tensors
        chunk, (grad_logprobs, _), (scale, soft_cap, temperature) = ctx.chunk, grads, ctx.transform
        wide = logsumexp.dtype
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if ctx.needs_input_grad[2] else None
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            grad_logits = output_logits(hidden[part], weight, bias, *ctx.transform)
            slope = None if soft_cap is None else (grad_logits * (temperature / soft_cap)).square_().neg_().add_(1)
            grad_logits.sub_(logsumexp[part, None]).exp_().neg_()
            grad_logits.scatter_add_(1, token_ids[part, None], grad_logits.new_ones(grad_logits.shape[0], 1))
            grad_logits.mul_(grad_logprobs[part, None] * (scale / temperature))
            if slope is not None:
                grad_logits.mul_(slope)
            narrow = grad_logits.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = narrow @ weight
            if grad_weight is not None and narrow.dtype == wide:
                grad_weight.addmm_(narrow.T, hidden[part])
            elif grad_weight is not None:
                grad_weight += narrow.T @ hidden[part]
            if grad_bias is not None:
                grad_bias += grad_logits.sum(dim=0)
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
            None,
            None,
        )


@torch.no_grad()
def output_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, soft_cap: float | None, temperature: float
) -> Tensor:
    """The logits of `token_logprobs`, `[N, vocabulary]`, float32 (float64 for float64 inputs), without gradient."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    logits = logits.to(float32_or_wider(logits.dtype))
    if scale != 1:
        logits.mul_(scale)
    if soft_cap is not None:
        logits.div_(soft_cap).tanh_().mul_(soft_cap)
    return logits.div_(temperature)


def _entropy(logits: Tensor, logsumexp: Tensor) -> Tensor:
    """H = logsumexp - sum_v p_v logit_v, `[token]`. Overwrites logits of -inf, of tokens of probability 0, which add 0."""
    probs = (logits - logsumexp[:, None]).exp_()
    return logsumexp - torch.linalg.vecdot(probs, logits.clamp_(min=torch.finfo(logits.dtype).min))


def float32_or_wider(dtype: torch.dtype) -> torch.dtype:
    """The type in which log-probs of logits of this type are computed."""
    return torch.float64 if dtype == torch.float64 else torch.float32
