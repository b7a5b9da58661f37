"""A key-value cache that is written in place: decoding a token copies only that token's keys and
values.

transformers' own `DynamicLayer` concatenates, so each decoding step copies the whole cache.
"""

from typing import Any

from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer


def growing_cache(config: PreTrainedConfig) -> DynamicCache:
    """Make the cache that transformers makes for a model, but with plain layers written in place.
    Values are the same bit for bit."""
    cache = DynamicCache(config=config)
    cache.layers = [
        GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    return cache


class GrowingLayer(DynamicLayer):
    """A layer of keys and values [row, head, token, dimension] at the front of two buffers that
    have room for more tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.buffers: list[Tensor] = []
        self._index: Tensor | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if self._index is not None:
            for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
                buffer.index_copy_(2, self._index, states)
            return self.buffers[0], self.buffers[1]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if not self.buffers:
            self.keys, self.values = (states[:, :, :0] for states in (key_states, value_states))
        # Full buffers are replaced by ones that are a quarter larger, so the cost of copying per
        # token is small, however long the completion is.
        if not self.buffers or end > self.buffers[0].shape[-2]:
            self._move(rows=None, size=room_for(end))
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = states
        # transformers reads views of the front of the buffers; nothing is copied.
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        self._move(rows=indices, size=room_for(self.get_seq_length()))

    def fix(self, room: int, index: Tensor) -> None:
        """Keep buffers of `room` tokens at fixed addresses from now on. The next token is written
        at `index` [1], and the whole buffers are read."""
        length = self.get_seq_length()
        self._move(rows=None, size=room)
        for buffer in self.buffers:
            # Attention multiplies masked values by 0, so they must be finite.
            buffer[:, :, length:] = 0
        self._index = index

    def release(self, length: int) -> None:
        """Let the buffers grow again; the first `length` tokens are kept."""
        self.keys, self.values = (buffer[:, :, :length] for buffer in self.buffers)
        self._index = None

    def _move(self, *, rows: Tensor | None, size: int) -> None:
        """Copy the contents, or some rows of them, to buffers with room for `size` tokens."""
        assert self.keys is not None and self.values is not None
        held = (self.keys, self.values)
        length = self.keys.shape[-2]
        num_rows = len(self.keys) if rows is None else len(rows)
        self.buffers = [
            states.new_empty(num_rows, states.shape[1], size, states.shape[-1]) for states in held
        ]
        for buffer, states in zip(self.buffers, held, strict=True):
            buffer[:, :, :length] = states if rows is None else states.index_select(0, rows)
        self.keys, self.values = (buffer[:, :, :length] for buffer in self.buffers)


def room_for(num_tokens: int) -> int:
    """Return the buffer size of a growing cache, in tokens, for `num_tokens` tokens."""
    return num_tokens + max(64, num_tokens // 4)
