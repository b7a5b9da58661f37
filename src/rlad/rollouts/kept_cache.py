"""Keys and values of episodes, kept between turns: the next turn only prefills its new tokens."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedModel

from rlad.rollouts.decoding_steps import PlainSteps
from rlad.rollouts.growing_cache import GrowingLayer, growing_cache

Held = list[tuple[Tensor, Tensor]]
"""Keys and values [token, head, dimension] of each layer."""


class KeptCache:
    """The keys and values of each episode, by the episode's index. They are valid as long as the
    weights do not change."""

    def __init__(self) -> None:
        self._held: dict[int, Held] = {}

    def put(self, number: int, cache: DynamicCache, row: int, mask: Tensor) -> None:
        """Keep a row of a cache; `mask` [token] is True for tokens that are not padding."""
        visible = mask.bool()
        held: Held = []
        for layer in cache.layers:
            assert isinstance(layer, GrowingLayer)
            assert layer.keys is not None and layer.values is not None
            held.append((_tokens(layer.keys[row], visible), _tokens(layer.values[row], visible)))
        self._held[number] = held

    def take(self, numbers: Sequence[int]) -> list[Held] | None:
        """Remove and return what is kept of some episodes; None unless all of them are there."""
        if not all(number in self._held for number in numbers):
            return None
        return [self._held.pop(number) for number in numbers]


class ContinuedSteps(PlainSteps):
    """The steps for rows that were decoded before: only tokens that are not in the cache are
    prefilled."""

    def __init__(
        self, model: PreTrainedModel, held: Sequence[Held], sequences: Sequence[Sequence[int]]
    ):
        self.cache = growing_cache(model.config)
        self._forward = partial(model, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        # Both parts are padded on the left: the gap in the middle is masked, and positions skip it.
        lengths = [len(layers[0][0]) for layers in held]
        for number, layer in enumerate(self.cache.layers):
            parts = zip(*(layers[number] for layers in held), strict=True)
            keys, values = (_padded(part).permute(0, 2, 1, 3) for part in parts)
            assert isinstance(layer, GrowingLayer)
            layer.update(keys.contiguous(), values.contiguous())
        device = model.device
        new = [
            torch.tensor(sequence[length:], device=device)
            for sequence, length in zip(sequences, lengths, strict=True)
        ]
        ids = _padded(new)
        seen = _padded([torch.ones(length, dtype=torch.long, device=device) for length in lengths])
        mask = torch.cat([seen, _padded([torch.ones_like(row) for row in new])], dim=1)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, seen.shape[1] :]
        output = self._forward(input_ids=ids, attention_mask=mask, position_ids=positions)
        self.logits = output.logits[:, -1]
        self._mask = mask
        self._surplus = 0


def _tokens(states: Tensor, visible: Tensor) -> Tensor:
    """Copy the visible tokens of keys or values [head, token, dimension], with tokens first."""
    return states[:, visible].transpose(0, 1)


def _padded(rows: Any) -> Tensor:
    """Pad rows [token, ...] on the left with zeros to one tensor."""
    return pad_sequence(list(rows), batch_first=True, padding_side="left")
