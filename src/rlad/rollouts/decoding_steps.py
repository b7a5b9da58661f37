"""The forward passes of decoding: one over the prompts, then one for each token.

`PlainSteps` is the reference. `GraphSteps` computes the same at fixed memory addresses, so that on
a GPU a step is one CUDA graph instead of hundreds of kernel launches.
"""

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from rlad.errors import UserError
from rlad.models.vision import sees
from rlad.rollouts.growing_cache import GrowingLayer, growing_cache, room_for
from rlad.text import first_line


class PlainSteps:
    """The plain steps: prefill each prompt once, then decode all rows together."""

    def __init__(
        self,
        model: PreTrainedModel,
        ids: Tensor,
        mask: Tensor,
        owners: Tensor,
        pictures: Mapping[str, Any] = MappingProxyType({}),
    ):
        """Prefill the prompts. `ids` and `mask` [prompt, token] are padded on the left; row `i`
        continues prompt `owners[i]`. `pictures` are the model's inputs for the prompts' pictures,
        with positions if those are not 0, 1, 2, ..."""
        self.cache = growing_cache(model.config)
        self._forward = partial(model, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        # Each prompt is prefilled once. Then its keys and values are copied for all rows of its
        # group, and each row continues separately.
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        given = {"position_ids": positions, **pictures}
        output = self._forward(input_ids=ids, attention_mask=mask, **given)
        self.logits: Tensor = output.logits[owners, -1]
        """Logits of the next token, [row, vocabulary]."""
        self.cache.batch_select_indices(owners)
        self._mask = mask[owners]
        # With positions by rows and columns, a picture has fewer positions than tokens.
        highest = given["position_ids"].flatten(0, -2).view(-1, *ids.shape).amax(dim=(0, 2))
        self._surplus = (mask.sum(dim=1) - 1 - highest)[owners, None] if pictures else 0

    @property
    def mask(self) -> Tensor:
        """The tokens of the cache that are not padding, for each row, [row, token]."""
        return self._mask

    def advance(self, tokens: Tensor) -> None:
        """Append one token to each row, and compute the next logits."""
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], dim=1)
        positions = self._mask.sum(dim=1, keepdim=True) - 1 - self._surplus
        output = self._forward(
            input_ids=tokens[:, None], attention_mask=self._mask, position_ids=positions
        )
        self.logits = output.logits[:, -1]

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these."""
        self.cache.batch_select_indices(rows)
        self._mask = self._mask[rows]
        if isinstance(self._surplus, Tensor):
            self._surplus = self._surplus[rows]


class GraphSteps(PlainSteps):
    """The same steps at fixed addresses: a CUDA graph on a GPU, plain calls elsewhere.

    Keys and values are written at a position that is a tensor, and attention reads the whole
    buffers through a mask. When rows are dropped or the buffers are full, both are made again and
    the next steps are captured again. The first step then runs without a graph, as a warm-up (it
    also makes the bfloat16 copies of weights that autocast keeps). The second is captured, and all
    later ones replay it.
    """

    def __init__(self, *args: Any):
        super().__init__(*args)
        self._fix()

    def advance(self, tokens: Tensor) -> None:
        if self._length == self._room:
            self._release()
            self._fix()
        self._tokens.copy_(tokens[:, None])
        if self._graph is not None:
            self._graph.replay()
        elif self._is_warm:
            self._capture()
        else:
            self._step()
        self._is_warm = tokens.is_cuda
        self._length += 1
        self.logits = self._logits

    def keep(self, rows: Tensor) -> None:
        self._release()
        super().keep(rows)
        self._fix()

    def _fix(self) -> None:
        """Make buffers at fixed addresses, with room for more tokens."""
        num_rows, self._length = self._mask.shape
        self._room = room_for(self._length)
        self._index = torch.tensor([self._length], device=self._mask.device)
        for layer in self.cache.layers:
            assert isinstance(layer, GrowingLayer)
            layer.fix(self._room, self._index)
        self._visible = self._mask.new_zeros((num_rows, 1, 1, self._room), dtype=torch.bool)
        self._visible[:, 0, 0, : self._length] = self._mask.bool()
        self._positions = self._mask.sum(dim=1, keepdim=True) - self._surplus
        self._tokens = torch.zeros_like(self._positions)
        self._graph: Any = None
        self._is_warm = False

    def _release(self) -> None:
        """Copy mask and cache out of the fixed buffers."""
        self._graph = None
        self._mask = self._visible[:, 0, 0, : self._length].to(self._mask.dtype)
        for layer in self.cache.layers:
            assert isinstance(layer, GrowingLayer)
            layer.release(self._length)

    def _step(self) -> None:
        """Run a step that reads and writes only fixed addresses."""
        self._visible.index_fill_(3, self._index, True)
        output = self._forward(
            input_ids=self._tokens, attention_mask=self._visible, position_ids=self._positions
        )
        self._logits: Tensor = output.logits[:, -1]
        self._positions += 1
        self._index += 1

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._step()
        except RuntimeError as error:
            raise UserError(
                f"a decoding step of this model cannot be captured as a CUDA graph "
                f"({first_line(error)}); set rollout.cuda_graphs = false."
            ) from error
        self._graph = graph
        graph.replay()


def obstacle_to_graphs(model: PreTrainedModel) -> str | None:
    """Return why a model's steps cannot be a CUDA graph; None if no reason is known."""
    layers = DynamicCache(config=model.config).layers
    if sees(model.config):
        return "the student reads pictures, whose rows and columns are not captured"
    if model.device.type != "cuda":
        return f"the student is on {model.device}, but CUDA graphs need an NVIDIA GPU"
    if any(type(layer) is not DynamicLayer for layer in layers):
        return "its cache is not plain keys and values in all layers"
    if model.config._attn_implementation != "sdpa":
        return f"its attention is {model.config._attn_implementation!r}, not 'sdpa'"
    if any(parameter.dim() > 2 for parameter in model.parameters()):
        return "its experts are chosen by the data, so steps differ in their kernels"
    return None
