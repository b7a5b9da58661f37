import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from rlad.rollouts.growing_cache import GrowingLayer, growing_cache
from tiny_models import tiny_model


def states(rows: int, tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, rows, 3, tokens, 5, generator=generator)
    return keys, values


def test_holds_what_a_dynamic_layer_holds_whatever_is_added_or_dropped():
    ours = GrowingLayer()
    theirs = DynamicLayer()
    kept = torch.tensor([3, 0, 3])
    for layer in (ours, theirs):
        layer.update(*states(4, 7, seed=0))
        for token in range(200):
            layer.update(*states(4, 1, seed=1 + token))
        layer.batch_select_indices(kept)
        for token in range(3):
            layer.update(*states(3, 1, seed=500 + token))
    assert ours.get_seq_length() == theirs.get_seq_length() == 210
    assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)


def test_a_token_is_written_where_there_is_room():
    layer = GrowingLayer()
    layer.update(*states(2, 4, seed=0))
    before = layer.buffers[0].data_ptr()
    for token in range(64):
        layer.update(*states(2, 1, seed=1 + token))
    assert layer.buffers[0].data_ptr() == before and layer.buffers[0].shape[-2] == 68
    layer.update(*states(2, 1, seed=99))
    assert layer.buffers[0].data_ptr() != before and layer.keys.shape[-2] == 69


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_a_model_gives_the_same_logits_bit_for_bit(family: str):
    model = tiny_model(family)
    logits = []
    for cache in (growing_cache(model.config), DynamicCache(config=model.config)):
        with torch.inference_mode():
            model(
                input_ids=torch.tensor([[5, 6, 7], [8, 9, 10]]),
                past_key_values=cache,
                use_cache=True,
            )
            cache.batch_select_indices(torch.tensor([1, 1, 0]))
            for token in (3, 4, 5):
                out = model(
                    input_ids=torch.tensor([[token], [2], [1]]),
                    past_key_values=cache,
                    use_cache=True,
                ).logits
        logits.append(out)
    assert torch.equal(*logits)
