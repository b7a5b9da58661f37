"""Decoding in memory that does not move, without the graph: against the plain steps."""

from typing import Any, cast

import pytest
import torch

from rlad.config.run import RolloutConfig
from rlad.errors import UserError
from rlad.rollouts import decoders
from rlad.rollouts.decoding_steps import GraphSteps, PlainSteps, obstacle_to_graphs
from rlad.rollouts.growing_cache import GrowingLayer
from rlad.rollouts.sampling import OwnSampler, sample
from tiny_models import random_tokens, tiny_language_model

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"tie_word_embeddings": True},
    "gpt2": {},
    "cohere": {"logit_scale": 0.25},
}
PROMPTS = random_tokens(7, 3, 1, 12, seed=1)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("compact_share", [0.2, 2.0])
def test_the_tokens_are_those_of_the_plain_steps(
    family: str, temperature: float, compact_share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While rows are dropped, and while buffers become full with all rows (a share of 2: never
    dropped)."""
    monkeypatch.setattr(decoders, "_COMPACT_SHARE", compact_share)
    ends = (1, 2) if compact_share < 1 else (1,)
    model = tiny_language_model(family, **FAMILIES[family], eos_token_ids=ends)
    settings: dict[str, Any] = {"group_size": 6, "max_completion_tokens": 100, "seed": 5}
    plain, fixed = (
        sample(model, PROMPTS, temperature=temperature, make_steps=steps, **settings)
        for steps in (PlainSteps, GraphSteps)
    )
    ours = [one for group in fixed for one in group]
    theirs = [one for group in plain for one in group]
    # The first buffers have room for 64 completion tokens.
    assert max(len(one.token_ids) for one in theirs) > 70
    for one, other in zip(ours, theirs, strict=True):
        assert one.token_ids == other.token_ids
        assert one.is_truncated == other.is_truncated
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


def test_a_step_reads_and_writes_the_same_addresses() -> None:
    """What a graph needs: between two changes of the buffers nothing is made anew."""
    model = tiny_language_model("llama").model
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    with torch.inference_mode():
        steps = GraphSteps(model, ids, torch.ones_like(ids), torch.tensor([0, 0, 1]))
        addresses = []
        for token in range(10):
            steps.advance(torch.tensor([token, 3, 4]))
            fixed = [steps._tokens, steps._visible, steps._positions, steps._index]
            fixed += buffers_of(steps)
            addresses.append([tensor.data_ptr() for tensor in fixed])
    assert all(one == addresses[0] for one in addresses)


def buffers_of(steps: GraphSteps) -> list[torch.Tensor]:
    """Keys and values of all layers."""
    layers = cast("list[GrowingLayer]", steps.cache.layers)
    return [buffer for layer in layers for buffer in layer.buffers]


def test_nothing_hidden_is_read() -> None:
    """Infinite numbers after the present token would show in the logits."""
    model = tiny_language_model("llama").model
    ids = torch.tensor([[5, 6, 7]])
    with torch.inference_mode():
        steps = GraphSteps(model, ids, torch.ones_like(ids), torch.tensor([0]))
        other = GraphSteps(model, ids, torch.ones_like(ids), torch.tensor([0]))
        for buffer in buffers_of(other):
            buffer[:, :, 4:] = 1e4
        for one in (steps, other):
            one.advance(torch.tensor([8]))
    assert torch.equal(steps.logits, other.logits)


def test_what_cannot_be_a_graph_is_refused() -> None:
    llama = tiny_language_model("llama")
    rollout = RolloutConfig(cuda_graphs=True)
    with pytest.raises(UserError, match=r"cuda_graphs = true, but the student is on cpu.*false"):
        OwnSampler(llama, rollout)
    assert "cpu" in str(obstacle_to_graphs(llama.model))
