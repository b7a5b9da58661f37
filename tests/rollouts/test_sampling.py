"""Sampled tokens and their log-probs: against a scoring pass, against the batch they were in,
against the distribution."""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from rlad.models.loading import LanguageModel
from rlad.rollouts import decoders, sampling
from rlad.rollouts.decoders import pick_tokens
from rlad.rollouts.sampling import sample
from rlad.rollouts.types import Completion, Rows
from rlad.scoring.scorer import Scorer
from rlad.scoring.tiles import LOGITS_PER_CHUNK
from tiny_models import (
    EOS,
    SECOND_EOS,
    VOCABULARY,
    LargestTensor,
    random_tokens,
    tiny_language_model,
)

WITH_PLAIN_CACHE: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"tie_word_embeddings": True},
    "gpt2": {},
    "mistral": {"sliding_window": 5},
    "gemma2": {"sliding_window": 5, "final_logit_softcapping": 30.0},
    "cohere": {"logit_scale": 0.25},
}
THROUGH_GENERATE: dict[str, dict[str, Any]] = {
    "mamba": {},
    "lfm2": {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3},
    "bloom": {},
    "openai-gpt": {},  # without a cache
}
FAMILIES = WITH_PLAIN_CACHE | THROUGH_GENERATE
PROMPTS = random_tokens(7, 3, 1, 12, seed=1)


def completions_of(
    model: LanguageModel, prompts: Sequence[Sequence[int]] = PROMPTS, **settings: Any
) -> list[list[Completion]]:
    defaults = {"group_size": 3, "max_completion_tokens": 16, "temperature": 1.0, "seed": 5}
    return sample(model, prompts, **(defaults | settings))


def tokens_of(groups: list[list[Completion]]) -> list[list[tuple[int, ...]]]:
    return [[completion.token_ids for completion in group] for group in groups]


# --- picking a token ------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_follow_the_softmax(temperature: float) -> None:
    """Chi-square of 40000 draws in 12 cells: with 11 degrees of freedom it exceeds 31.3 once in
    1000 times."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(12, generator=generator)
    num_draws = 40_000
    tokens, logprobs = pick_tokens(
        logits.expand(num_draws, 12), torch.rand(num_draws, generator=generator), temperature
    )
    probs = (logits.double() / temperature).softmax(dim=-1)
    expected = probs * num_draws
    counts = torch.bincount(tokens, minlength=12).double()
    assert float(((counts - expected).square() / expected).sum()) < 31.3
    assert torch.allclose(logprobs.double(), probs.log()[tokens], atol=1e-6)


def test_the_inverse_distribution_function_by_hand() -> None:
    logits = torch.tensor([0.25, 0.0, 0.5, 0.25]).log().expand(6, 4)
    uniforms = torch.tensor([0.0, 0.2499, 0.2501, 0.7499, 0.7501, 1 - 2**-24])
    assert pick_tokens(logits, uniforms, 1.0)[0].tolist() == [0, 0, 2, 2, 3, 3]


def test_a_logprob_is_finite_whatever_underflows_and_nan_stays() -> None:
    logits = torch.tensor([[0.0, 200.0], [0.0, math.nan]])
    _, logprobs = pick_tokens(logits, torch.zeros(2), 1.0)
    assert math.isfinite(logprobs[0]) and math.isnan(logprobs[1])


def test_rows_are_picked_alike_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 40, generator=generator)
    uniforms = torch.rand(50, generator=generator)
    whole = pick_tokens(logits, uniforms, 0.7)
    monkeypatch.setitem(LOGITS_PER_CHUNK, "cpu", 16 * 40)
    with LargestTensor() as largest:
        assert all(map(torch.equal, pick_tokens(logits, uniforms, 0.7), whole))
    assert largest.num_elements == 16 * 40


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_never_a_token_of_probability_zero(dtype: torch.dtype) -> None:
    """At every edge: first and last tokens impossible, the uniform number 0, the largest below 1,
    and exact cell borders."""
    generator = torch.Generator().manual_seed(0)
    for num_possible in (1, 2, 8, 500):
        logits = torch.full((1000,), -math.inf, dtype=dtype)
        possible = torch.randperm(998, generator=generator)[:num_possible] + 1
        logits[possible] = torch.randn(num_possible, generator=generator).to(dtype)
        borders = logits.float().softmax(dim=-1).cumsum(dim=-1).clamp(max=1 - 2**-24)
        uniforms = torch.cat(
            [torch.tensor([0.0, 1 - 2**-24]), borders, torch.rand(2000, generator=generator)]
        )
        tokens, logprobs = pick_tokens(logits.expand(len(uniforms), 1000), uniforms, 1.0)
        assert torch.isin(tokens, possible).all()
        assert torch.isfinite(logprobs).all()


def test_temperature_zero_reports_the_logprob_at_temperature_one() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    tokens, logprobs = pick_tokens(logits, torch.tensor([0.999]), 0.0)
    assert tokens.tolist() == [1]
    assert logprobs.item() == pytest.approx(3 - math.log(math.e + math.e**2 + math.e**3), abs=1e-6)


# --- log-probs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_are_those_of_a_scoring_pass(family: str, temperature: float) -> None:
    """Prefill with left padding, cache, sliding window and recurrent state against one padded-right
    pass without any."""
    model = tiny_language_model(family, **FAMILIES[family])
    groups = completions_of(model, temperature=temperature)
    prompts = [prompt for prompt in PROMPTS for _ in range(3)]
    completions = [completion for group in groups for completion in group]
    scores = Scorer(model, temperature=temperature, tokens_per_batch=60).score(
        prompts, [c.token_ids for c in completions]
    )
    for completion, values in zip(completions, scores, strict=True):
        assert torch.allclose(torch.tensor(completion.logprobs), values, rtol=0, atol=1e-5)
    assert len({c.token_ids for c in completions}) > 8


def test_the_two_decoders_are_chosen_by_the_cache() -> None:
    for families, through_own in ((WITH_PLAIN_CACHE, True), (THROUGH_GENERATE, False)):
        for family, settings in families.items():
            model = tiny_language_model(family, **settings).model
            assert decoders.cache_rows_can_be_dropped(model) == through_own, family
    # The layers of some hybrids derive from the plain layer, yet dropping rows would leave their
    # recurrent state behind.
    hybrid = tiny_language_model().model
    hybrid.config.layer_types = ["hybrid", "hybrid"]
    assert not decoders.cache_rows_can_be_dropped(hybrid)


# --- what tokens may not depend on ----------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_do_not_depend_on_how_many_rows_are_decoded_at_once(family: str) -> None:
    model = tiny_language_model(family, **FAMILIES[family])
    together = tokens_of(completions_of(model))
    for max_batch_rows in (1, 2, 3, 7):
        assert tokens_of(completions_of(model, max_batch_rows=max_batch_rows)) == together


def test_padding_stays_out_of_a_recurrent_state() -> None:
    """RecurrentGemma ignores the attention mask in its recurrence, so unequal prompts may not be
    padded for it."""
    settings = {
        "block_types": ["recurrent", "attention"],
        "lru_width": 32,
        "attention_window_size": 8,
    }
    model = tiny_language_model("recurrent_gemma", **settings)
    prompts = random_tokens(7, 3, 12, seed=1)
    completions = list(chain(*completions_of(model, prompts)))
    repeated = [prompt for prompt in prompts for _ in range(3)]
    scores = Scorer(model, temperature=1.0, tokens_per_batch=60).score(
        repeated, [c.token_ids for c in completions]
    )
    for completion, values in zip(completions, scores, strict=True):
        assert torch.allclose(torch.tensor(completion.logprobs), values, rtol=0, atol=1e-5)


def test_no_more_rows_than_allowed_are_decoded_at_once() -> None:
    """Also when one group alone is larger."""
    model = tiny_language_model(vocab_size=VOCABULARY)
    sizes: list[int] = []
    hook = model.model.register_forward_pre_hook(
        lambda *args: sizes.append(len(args[2]["input_ids"])), with_kwargs=True
    )
    completions_of(model, group_size=5, max_batch_rows=4)
    hook.remove()
    assert max(sizes) == 4


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "mamba", "lfm2"])
def test_tokens_do_not_depend_on_the_other_prompts(family: str) -> None:
    """The first prompts keep their rows and their random numbers when a longer prompt joins and
    pads them."""
    model = tiny_language_model(family, **FAMILIES[family])
    assert tokens_of(completions_of(model))[:3] == tokens_of(completions_of(model, PROMPTS[:3]))


@pytest.mark.parametrize("family", WITH_PLAIN_CACHE)
def test_tokens_do_not_depend_on_dropping_finished_rows(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_language_model(
        family, **WITH_PLAIN_CACHE[family], eos_token_ids=tuple(range(1, 12))
    )
    results = []
    for share in (2.0, 0.2, 0.0):  # never, the default, at every step
        monkeypatch.setattr(decoders, "_COMPACT_SHARE", share)
        results.append(completions_of(model, group_size=8))
    lengths = {len(completion.token_ids) for group in results[0] for completion in group}
    assert len(lengths) > 5
    for other in results[1:]:
        assert tokens_of(other) == tokens_of(results[0])
        for ours, theirs in zip(results[0], other, strict=True):
            for a, b in zip(ours, theirs, strict=True):
                assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("family", WITH_PLAIN_CACHE)
def test_both_decoders_give_the_same_tokens(
    family: str, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_language_model(family, **WITH_PLAIN_CACHE[family], eos_token_ids=(EOS, SECOND_EOS))
    results = []
    for is_plain in (True, False):
        monkeypatch.setattr(sampling, "cache_rows_can_be_dropped", lambda model, it=is_plain: it)
        results.append(chain(*completions_of(model, group_size=3, temperature=temperature)))
    for ours, theirs in zip(*results, strict=True):
        assert (ours.token_ids, ours.is_truncated) == (theirs.token_ids, theirs.is_truncated)
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_the_models_own_generation_settings_have_no_influence(family: str) -> None:
    """Chat models ship a repetition penalty; with it the log-probs would be those of another
    distribution."""
    model = tiny_language_model(family)
    plain = completions_of(model)
    model.model.generation_config = GenerationConfig(
        repetition_penalty=3.0, min_new_tokens=16, suppress_tokens=[7, 8, 9]
    )
    assert completions_of(model) == plain
    assert model.model.generation_config.repetition_penalty == 3.0


# --- ends -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "mistral", "mamba"])
def test_temperature_zero_is_the_greedy_decoding_of_transformers(family: str) -> None:
    model = tiny_language_model(family, **FAMILIES[family])
    groups = completions_of(model, temperature=0.0, group_size=1)
    for prompt, (completion,) in zip(PROMPTS, groups, strict=True):
        ids = torch.tensor([prompt])
        out = model.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False
        )
        assert completion.token_ids == tuple(out[0, len(prompt) :].tolist())


@pytest.mark.parametrize("family", ["llama", "mamba"])
def test_any_end_token_ends_a_completion_and_stays_in_it(family: str) -> None:
    ends = (EOS, SECOND_EOS, 17, 18, 19)
    model = tiny_language_model(family, eos_token_ids=ends)
    endless = replace(model, eos_token_ids=(VOCABULARY,))
    free, ended = (chain(*completions_of(m, group_size=16)) for m in (endless, model))
    found = set()
    for long, short in zip(free, ended, strict=True):
        end = next((i for i, token in enumerate(long.token_ids) if token in ends), None)
        length = len(long.token_ids) if end is None else end + 1
        assert short.token_ids == long.token_ids[:length]
        assert len(short.logprobs) == len(short.token_ids)
        assert short.is_truncated == (short.token_ids[-1] not in ends)
        found.add(short.token_ids[-1])
    assert len(found & set(ends)) >= 3


def test_an_end_token_at_the_limit_is_no_truncation() -> None:
    rows = [[5, 1], [5, 6], [1, 9]]
    completions = [sampling._completion(row, [-1.0, -2.0], {EOS}) for row in rows]
    assert [(c.token_ids, c.is_truncated) for c in completions] == [
        ((5, 1), False),
        ((5, 6), True),
        ((1,), False),
    ]
    assert completions[2].logprobs == (-1.0,)


_LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 4,
    "long_factor": [3.0] * 4,
    "original_max_position_embeddings": 16,
    "rope_theta": 10000.0,
}
_SHORT_CONTEXTS: list[tuple[str, dict[str, Any]]] = [
    ("gpt2", {"n_positions": 16}),
    ("phi3", {"original_max_position_embeddings": 16, "rope_scaling": _LONGROPE}),
]


@pytest.mark.parametrize("family, settings", _SHORT_CONTEXTS)
def test_a_row_that_fills_the_context_ends_while_others_are_decoded(family, settings) -> None:
    """A model has no position after its context, and longrope then changes those of all rows."""
    model = tiny_language_model(family, eos_token_ids=(999,), **settings)
    prompts = random_tokens(12, *[3] * 9)
    limits = [4] + [10] * 9
    rows = Rows(10, range(10), limits)
    settings = {"group_size": 1, "max_completion_tokens": 10, "temperature": 1.0, "seed": 0}
    found = [group[0] for group in sample(model, prompts, rows=rows, **settings)]
    assert [len(one.token_ids) for one in found] == limits
    scorer = Scorer(model, temperature=1.0, tokens_per_batch=1000)
    scores = scorer.score(prompts, [one.token_ids for one in found])
    for one, expected in zip(found, scores, strict=True):
        torch.testing.assert_close(torch.tensor(one.logprobs), expected, rtol=0, atol=2e-5)


def test_a_single_token_and_a_single_prompt() -> None:
    model = tiny_language_model()
    (group,) = completions_of(model, [[9]], max_completion_tokens=1, group_size=2)
    assert [len(c.token_ids) for c in group] == [1, 1]


def test_the_seed_decides() -> None:
    model = tiny_language_model()
    assert completions_of(model) == completions_of(model)
    assert tokens_of(completions_of(model)) != tokens_of(completions_of(model, seed=6))


# --- groups as they end ---------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("max_batch_rows", [2, 4, 256])
def test_each_group_is_handed_on_once_and_whole(family: str, max_batch_rows: int) -> None:
    """Also where its rows are decoded in different parts, and outside of inference mode and of the
    compute type."""
    model = replace(tiny_language_model(family, **FAMILIES[family]), compute_dtype=torch.bfloat16)
    seen: dict[int, list[Completion]] = {}

    def see(number: int, completions: list[Completion]) -> None:
        assert (
            number not in seen
            and not torch.is_inference_mode_enabled()
            and not torch.is_autocast_enabled("cpu")
        )
        seen[number] = completions

    groups = completions_of(model, max_batch_rows=max_batch_rows, after_group=see)
    assert [seen[number] for number in range(len(PROMPTS))] == groups


def test_a_group_is_handed_on_when_its_last_completion_ends() -> None:
    num_steps = 0
    steps_at = {}

    def count() -> None:
        nonlocal num_steps
        num_steps += 1

    def see(number: int, completions: list[Completion]) -> None:
        steps_at[number] = num_steps

    groups = completions_of(
        tiny_language_model(), max_completion_tokens=64, before_token=count, after_group=see
    )
    longest = {
        number: max(len(completion.token_ids) for completion in group)
        for number, group in enumerate(groups)
    }
    assert steps_at == longest and len(set(longest.values())) > 2


# --- interruption and refusals --------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "mamba"])
def test_sampling_can_be_stopped_between_two_tokens(family: str) -> None:
    model = tiny_language_model(family)
    own = model.model.generation_config
    num_calls = 0

    def stop_at_the_fifth() -> None:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        completions_of(model, before_token=stop_at_the_fifth)
    assert num_calls == 5
    assert model.model.generation_config is own


def test_refusals() -> None:
    model = tiny_language_model()
    with pytest.raises(ValueError, match="a prompt has no tokens"):
        completions_of(model, [[5, 6], []])
    with torch.no_grad():
        model.model.lm_head.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="'tiny-llama' are not finite"):
        completions_of(model)


def test_a_student_samples_in_the_type_it_computes_in() -> None:
    """In training and in evaluation alike, because sampling itself asks the model for it; log-probs
    are float32."""
    wide = tiny_language_model()
    model = replace(wide, compute_dtype=torch.bfloat16)
    dtypes = set()
    hook = wide.model.lm_head.register_forward_hook(lambda module, args, out: dtypes.add(out.dtype))
    groups = completions_of(model)
    hook.remove()
    assert dtypes == {torch.bfloat16}
    prompts = [prompt for prompt in PROMPTS for _ in range(3)]
    completions = list(chain(*groups))
    scored = {}
    for scorer in (model, wide):
        scores = Scorer(scorer, temperature=1.0, tokens_per_batch=60).score(
            prompts, [c.token_ids for c in completions]
        )
        sampled = [torch.tensor(c.logprobs) for c in completions]
        scored[scorer] = float((torch.cat(sampled) - torch.cat(scores)).abs().mean())
    assert scored[model] < scored[wide] < 0.02
