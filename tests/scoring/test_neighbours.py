"""Log-probs that depend on what else is in the batch, and modules that training mode leaves out."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlad.config.run import LoraConfig
from rlad.engines.native.loop import NativeEngine
from rlad.errors import RunFailedError, UserError
from rlad.models.without_weights import context_tokens
from rlad.rollouts.sampling import sample
from rlad.scoring.scorer import Scorer
from rlad.scoring.training_mode import require_same_gradients
from tiny_models import random_tokens, tiny_language_model

_LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 4,
    "long_factor": [3.0] * 4,
    "original_max_position_embeddings": 16,
    "rope_theta": 10000.0,
}
_DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
BY_LENGTH: list[tuple[str, dict[str, Any]]] = [
    ("phi3", {"original_max_position_embeddings": 16, "rope_scaling": _LONGROPE}),
    ("llama", {"max_position_embeddings": 16, "rope_scaling": _DYNAMIC}),
]


def scored(model: Any, rows: list[list[int]], tokens_per_batch: int) -> list[torch.Tensor]:
    scorer = Scorer(model, temperature=0.7, tokens_per_batch=tokens_per_batch)
    return scorer.score([row[:3] for row in rows], [row[3:] for row in rows])


@pytest.mark.parametrize("family, settings", BY_LENGTH)
def test_up_to_the_border_sampler_and_scorer_are_the_forward_pass_of_one_row(family, settings):
    model = tiny_language_model(family, **settings)
    assert model.context_tokens == context_tokens(model.model.config) == 16
    prompts = random_tokens(3, 5)
    groups = sample(model, prompts, group_size=3, max_completion_tokens=11, temperature=0.7, seed=0)
    pairs = [(p, c) for p, group in zip(prompts, groups, strict=True) for c in group]
    scorer = Scorer(model, temperature=0.7, tokens_per_batch=1000)
    scores = scorer.score([p for p, _ in pairs], [c.token_ids for _, c in pairs])
    for (prompt, completion), found in zip(pairs, scores, strict=True):
        ids = torch.tensor([[*prompt, *completion.token_ids]])
        with torch.no_grad():
            logits = model.model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        logprobs = (logits.double() / 0.7).log_softmax(dim=-1)
        expected = logprobs.gather(1, ids[0, len(prompt) :, None]).squeeze(1)
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-5)
        sampled = torch.tensor(completion.logprobs, dtype=torch.float64)
        torch.testing.assert_close(sampled, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("family, settings", BY_LENGTH)
def test_beyond_the_border_neither_samples_nor_scores(family, settings):
    model = tiny_language_model(family, **settings)
    with pytest.raises(UserError, match="17 tokens is more than the 16"):
        scored(model, random_tokens(8, 17), 1000)
    with pytest.raises(UserError, match="lower rollout"):
        sample(
            model,
            random_tokens(5),
            group_size=1,
            max_completion_tokens=12,
            temperature=1.0,
            seed=0,
        )


def test_any_length_is_allowed_where_frequencies_do_not_depend_on_it():
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
    settings = yarn | {"original_max_position_embeddings": 16}
    assert tiny_language_model("llama", rope_scaling=settings).context_tokens == 256


def test_a_model_that_sees_its_neighbours_is_found_by_its_own_scorer():
    model = tiny_language_model()
    embeddings = model.model.get_input_embeddings()
    # Each token's embedding gets a bit of the widest row of its batch.
    embeddings.register_forward_hook(lambda _, ids, states: states + 0.3 * ids[0].shape[1])
    rows = random_tokens(6, 20)
    with pytest.raises(RunFailedError, match="other log-probs in a batch than alone"):
        scored(model, rows, 1000)
    assert len(scored(model, rows, 1)) == 2


def test_an_adapter_that_training_mode_passes_by_is_refused():
    pytest.importorskip("peft")
    from rlad.models.adapters import add_lora

    settings = {
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"],
        "vocab_size_per_layer_input": 64,
        "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 0,
        "laurel_rank": 4,
        "altup_num_inputs": 2,
        "activation_sparsity_pattern": [0.0, 0.0],
        "intermediate_size": [64, 64],
    }
    model = tiny_language_model("gemma3n_text", **settings)
    add_lora(model.model, LoraConfig(rank=3, alpha=12.0), base="tiny", seed=3)
    with pytest.raises(UserError, match="target_modules without correction_coefs"):
        require_same_gradients(model)
    plain = tiny_language_model()
    add_lora(plain.model, LoraConfig(rank=3, alpha=12.0), base="tiny", seed=3)
    require_same_gradients(plain)


def test_a_sampler_that_disagrees_at_the_first_batch_stops_the_run():
    def engine(dtype: str, *, is_own: bool = True) -> Any:
        return SimpleNamespace(
            _is_compared=False,
            step=0,
            sampler=SimpleNamespace(is_trainers_own=is_own),
            student=SimpleNamespace(name="tiny"),
            config=SimpleNamespace(student=SimpleNamespace(dtype=dtype)),
        )

    check = NativeEngine._require_same_logprobs
    with pytest.raises(RunFailedError, match=r"step 1: .* differ by 0.0011 nats per token"):
        check(engine("float32"), {"sampler/mismatch/mean": 1.1e-3})
    check(engine("float32"), {"sampler/mismatch/mean": 0.9e-3})
    check(engine("bfloat16"), {"sampler/mismatch/mean": 0.4})
    check(engine("float32", is_own=False), {"sampler/mismatch/mean": 0.4})
    later = engine("float32")
    check(later, {})  # no group had a reward to train on
    assert not later._is_compared
    check(later, {"sampler/mismatch/mean": 1e-6})
    check(later, {"sampler/mismatch/mean": 1.0})  # which the guards warn of
