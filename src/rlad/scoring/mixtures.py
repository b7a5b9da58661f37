"""Combined distributions: mixtures of several models, and the choice of one model per token."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from rlad.scoring.distributions import TokenDistributions, logsumexp_of
from rlad.scoring.tiles import tile_shape


class _Combined:
    """The base of combined distributions of the same tokens over the same vocabulary."""

    parts: Sequence[TokenDistributions]

    @property
    def num_tokens(self) -> int:
        return self.parts[0].num_tokens

    @property
    def vocabulary(self) -> int:
        return self.parts[0].vocabulary

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype

    @property
    def device(self) -> torch.device:
        return self.parts[0].device


@dataclass(frozen=True)
class GeometricMixture(_Combined):
    """The mixture π proportional to the product of π_i^w_i. Its logits are the weighted sum of
    logits."""

    parts: Sequence[TokenDistributions]
    weights: Sequence[float]

    @torch.no_grad()
    def logits(self, rows: slice = slice(None), entries: slice = slice(None)) -> Tensor:
        total = self.parts[0].logits(rows, entries).mul_(self.weights[0])
        for part, weight in zip(self.parts[1:], self.weights[1:], strict=True):
            total.add_(part.logits(rows, entries), alpha=weight)
        return total

    def placed(self, places: Tensor, num_tokens: int) -> "GeometricMixture":
        return replace(self, parts=[part.placed(places, num_tokens) for part in self.parts])


@dataclass(frozen=True)
class ArithmeticMixture(_Combined):
    """The mixture π = sum_i w_i π_i, with weights that sum to 1."""

    parts: Sequence[TokenDistributions]
    log_weights: Sequence[float]
    tile: tuple[int, int] | None = None
    """tile size for computing the parts' log-sum-exps, once"""
    _shifts: list[Tensor] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # log w_i - the log-sum-exp of part i, which turns its logits into log w_i π_i.
        tile = self.tile or tile_shape(self.device.type, self.num_tokens, self.vocabulary)
        shifts = [
            log_weight - logsumexp_of(part, tile)
            for part, log_weight in zip(self.parts, self.log_weights, strict=True)
        ]
        object.__setattr__(self, "_shifts", shifts)

    @torch.no_grad()
    def logits(self, rows: slice = slice(None), entries: slice = slice(None)) -> Tensor:
        total: Tensor | None = None
        for part, shift in zip(self.parts, self._shifts, strict=True):
            logprobs = part.logits(rows, entries).add_(shift[rows, None])
            total = logprobs if total is None else torch.logaddexp(total, logprobs)
        assert total is not None
        return total

    def placed(self, places: Tensor, num_tokens: int) -> "ArithmeticMixture":
        return replace(self, parts=[part.placed(places, num_tokens) for part in self.parts])


@dataclass(frozen=True)
class OneForEachToken(_Combined):
    """The choice of one part's distribution for each token; the other parts have none there."""

    parts: Sequence[TokenDistributions]
    owners: Tensor
    """[N], the index of each token's part"""

    @torch.no_grad()
    def logits(self, rows: slice = slice(None), entries: slice = slice(None)) -> Tensor:
        owners = self.owners[rows].to(self.device)
        total: Tensor | None = None
        # Most tiles have tokens of one task, and so of one part only.
        for number in owners.unique().tolist():
            logits = self.parts[number].logits(rows, entries)
            if total is None:
                total = logits
            else:
                total = torch.where((owners == number)[:, None], logits, total)
        assert total is not None
        return total

    def placed(self, places: Tensor, num_tokens: int) -> "OneForEachToken":
        owners = self.owners.new_zeros(num_tokens)
        owners[places] = self.owners
        parts = [part.placed(places, num_tokens) for part in self.parts]
        return OneForEachToken(parts, owners)
