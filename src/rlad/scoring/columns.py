"""The log-probs of some entries of the vocabulary at each token, and of all others merged into one
(the tail). A teacher outside this process gives no more than that."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlad.objectives.divergences import with_tail
from rlad.scoring.distributions import TokenDistributions
from rlad.scoring.tiles import tile_shape
from rlad.scoring.top_k import column_logprobs, likeliest


@dataclass(frozen=True, slots=True)
class TokenColumns:
    """Columns of K entries at each of N tokens. A token without columns has NaN log-probs."""

    ids: Tensor
    """int64 `[N, K]`"""
    logprobs: Tensor
    """`[N, K + 1]`, for the entries and the tail"""

    @classmethod
    def missing(cls, num_tokens: int, top_k: int) -> "TokenColumns":
        """Make columns in which no token has any."""
        ids = torch.zeros(num_tokens, top_k, dtype=torch.int64)
        return cls(ids, torch.full((num_tokens, top_k + 1), torch.nan))

    @classmethod
    def without_tail(cls, ids: Tensor, logprobs: Tensor, *, vocabulary: int) -> "TokenColumns":
        """Make columns from log-probs `[N, K]`; the tail is what their probabilities leave of 1."""
        whole = with_tail(logprobs)
        if ids.shape[1] == vocabulary:  # the tail is empty, whatever the sum was rounded to
            whole[:, -1] = torch.where(whole[:, -1].isnan(), torch.nan, -torch.inf)
        return cls(ids, whole)

    @classmethod
    def joined(cls, parts: Sequence["TokenColumns"]) -> "TokenColumns":
        """Concatenate the tokens of the parts."""
        return cls(
            torch.cat([part.ids for part in parts]), torch.cat([part.logprobs for part in parts])
        )

    def split(self, lengths: Sequence[int]) -> list["TokenColumns"]:
        """Undo `joined`, given how many tokens each part has."""
        pairs = zip(self.ids.split(lengths), self.logprobs.split(lengths), strict=True)
        return [TokenColumns(*pair) for pair in pairs]

    def placed(self, places: Tensor, num_tokens: int) -> "TokenColumns":
        """Move token i to `places[i]` of `num_tokens`; the others have no columns."""
        found = TokenColumns.missing(num_tokens, self.ids.shape[1])
        logprobs = found.logprobs.to(self.logprobs)
        ids = found.ids.to(self.ids)
        ids[places] = self.ids
        logprobs[places] = self.logprobs
        return TokenColumns(ids, logprobs)


def columns_of(
    distributions: TokenDistributions, top_k: int, ids: Tensor | None = None
) -> TokenColumns:
    """Return the columns of the entries `ids` [N, K], by default of the `top_k` most likely."""
    given = distributions
    rows, entries = tile_shape(given.device.type, given.num_tokens, given.vocabulary)
    tile = (max(1, rows // 3), entries)
    chosen = likeliest(given, top_k, tile=tile) if ids is None else ids.to(given.device)
    logprobs, _ = column_logprobs(given, chosen, tile=tile)
    return TokenColumns(chosen, logprobs)
