"""Next-token distributions as hidden states and an output layer. Logits exist only in tiles."""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class TokenDistributions(Protocol):
    """The next-token distributions softmax(logits) of N tokens over a vocabulary; NaN for tokens
    without one."""

    @property
    def num_tokens(self) -> int: ...

    @property
    def vocabulary(self) -> int: ...

    @property
    def dtype(self) -> torch.dtype:
        """The type of the logits: float32 or float64."""
        ...

    @property
    def device(self) -> torch.device: ...

    def logits(self, rows: slice = ..., entries: slice = ...) -> Tensor:
        """Compute a tile of the logits, `[token, entry]`, without gradient. The caller may change
        it in place."""
        ...

    def placed(self, places: Tensor, num_tokens: int) -> "TokenDistributions":
        """Move token i to `places[i]` of `num_tokens`; the others have no distribution."""
        ...


class Distributions(NamedTuple):
    """The distributions softmax(logits) of N tokens over a vocabulary.

        logits = capped(scale (hidden @ weight.T + bias)) / temperature
        capped(z) = soft_cap tanh(z / soft_cap), without `soft_cap` z

    `weight` and `bias` are rounded to the type of `hidden`.
    """

    hidden: Tensor
    """[N, hidden_size]"""
    weight: Tensor
    """[vocabulary, hidden_size]"""
    bias: Tensor | None = None
    """[vocabulary]"""
    scale: float = 1.0
    soft_cap: float | None = None
    temperature: float = 1.0
    weight_grad: Tensor | None = None
    """if given, the gradient of `weight` is added to it in place, and autograd gets none"""

    @property
    def num_tokens(self) -> int:
        return len(self.hidden)

    @property
    def vocabulary(self) -> int:
        return len(self.weight)

    @property
    def dtype(self) -> torch.dtype:
        return float32_or_wider(self.hidden.dtype)

    @property
    def device(self) -> torch.device:
        return self.weight.device

    @torch.no_grad()
    def logits(self, rows: slice = slice(None), entries: slice = slice(None)) -> Tensor:
        """Compute a tile of the logits, `[token, entry]`, float32 (float64 for float64 inputs)."""
        # The product is in the model's own type, everything after it in float32 and in place: a
        # tile is the largest tensor.
        hidden = self.hidden[rows]
        bias = None if self.bias is None else self.bias[entries].to(hidden.dtype)
        logits = torch.nn.functional.linear(hidden, self.weight[entries].to(hidden.dtype), bias)
        logits = logits.to(float32_or_wider(logits.dtype))
        if self.scale != 1:
            logits.mul_(self.scale)
        if self.soft_cap is not None:
            logits.div_(self.soft_cap).tanh_().mul_(self.soft_cap)
        return logits.div_(self.temperature)

    @torch.no_grad()
    def placed(self, places: Tensor, num_tokens: int) -> "Distributions":
        """See `TokenDistributions`."""
        hidden = self.hidden.new_full((num_tokens, self.hidden.shape[1]), torch.nan)
        hidden[places] = self.hidden
        return self._replace(hidden=hidden)

    def slope_of_cap(self, logits: Tensor) -> Tensor | None:
        """Return the derivative of `capped` at these logits; None without a cap."""
        if self.soft_cap is None:
            return None
        return (logits * (self.temperature / self.soft_cap)).square_().neg_().add_(1)

    def tiles(self, tile: tuple[int, int]) -> Iterator[tuple[slice, list[slice]]]:
        """See `tiles_of`."""
        return tiles_of(self, tile)


class OutputGradient:
    """The gradients of hidden states, weight and bias, added up tile by tile."""

    def __init__(self, of: Distributions, wanted: tuple[bool, bool, bool]):
        """Start at zero; `wanted` tells which of the three gradients autograd needs."""
        dtype = float32_or_wider(of.hidden.dtype)
        wants_hidden, wants_weight, wants_bias = wanted
        self.of = of
        self.hidden = torch.zeros_like(of.hidden, dtype=dtype) if wants_hidden else None
        # Adding to the caller's sum saves a matrix of the size of the weight.
        self.weight = of.weight_grad
        if wants_weight and self.weight is None:
            self.weight = torch.zeros_like(of.weight, dtype=dtype)
        self.bias = None
        if wants_bias and of.bias is not None:
            self.bias = torch.zeros_like(of.bias, dtype=dtype)

    def add(self, rows: slice, entries: slice, grad: Tensor) -> None:
        """Add a tile's part, given the gradient of its hidden @ weight.T + bias."""
        if self.bias is not None:
            self.bias[entries] += grad.sum(dim=0)
        hidden = self.of.hidden[rows]
        grad = grad.to(hidden.dtype)
        if self.hidden is not None:
            _add_product(self.hidden[rows], grad, self.of.weight[entries].to(hidden.dtype))
        if self.weight is not None:
            _add_product(self.weight[entries], grad.T, hidden)

    def for_autograd(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the sums in the types of their inputs; None for gradients that autograd does not
        get."""
        of = self.of
        weight = None if of.weight_grad is not None else self.weight
        return (
            None if self.hidden is None else self.hidden.to(of.hidden.dtype),
            None if weight is None else weight.to(of.weight.dtype),
            None if self.bias is None or of.bias is None else self.bias.to(of.bias.dtype),
        )


def tiles_of(
    distributions: TokenDistributions, tile: tuple[int, int]
) -> Iterator[tuple[slice, list[slice]]]:
    """Yield parts of the tokens, each with the parts of the vocabulary; at most of the size
    `tile`."""
    entries = list(_parts(distributions.vocabulary, tile[1]))
    return ((rows, entries) for rows in _parts(distributions.num_tokens, tile[0]))


@torch.no_grad()
def logsumexp_of(distributions: TokenDistributions, tile: tuple[int, int]) -> Tensor:
    """Return the log-sum-exp of each token's logits, `[N]`."""
    of_rows = []
    for rows, parts in tiles_of(distributions, tile):
        of_tiles = [distributions.logits(rows, entries).logsumexp(dim=-1) for entries in parts]
        of_rows.append(torch.stack(of_tiles).logsumexp(dim=0))
    return torch.cat(of_rows) if of_rows else torch.empty(0, dtype=distributions.dtype)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Compute total += left @ right, in the type of `total`."""
    if total.dtype == left.dtype:  # without a temporary for the product
        total.addmm_(left, right)
    else:
        total += left @ right


def _parts(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def float32_or_wider(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which log-probs of logits of this type are computed."""
    return torch.float64 if dtype == torch.float64 else torch.float32
