"""Prompts with pictures, scored and sampled: against transformers' own forward pass, alone against
in a batch, and in gradient, for models of three layouts."""

from typing import Any

import pytest
import torch

from rlad.errors import UserError
from rlad.models.language_part import freeze_vision
from rlad.models.loading import LanguageModel
from rlad.models.pictures import PicturedPrompt
from rlad.rollouts.sampling import sample
from rlad.scoring.scorer import Scorer
from tiny_models import random_tokens
from tiny_vision import EOS, FAMILIES, picture, tiny_seeing_model

TEMPERATURE = 0.7
Row = tuple[Any, list[int]]


def prompt_with(model: LanguageModel, *seeds: int, words: str = "w20 w21") -> PicturedPrompt:
    """A prompt of pictures of different sizes, with words around them."""
    vision = model.vision
    assert vision is not None
    sizes = ((32, 32), (48, 32), (16, 48))
    pictures = [picture(seed, sizes[seed % 3]) for seed in seeds]
    text = f"w12 {words} " + " w13 ".join([vision.wrapped_token] * len(pictures)) + " w14 w15"
    return vision.prompt(text, pictures, add_special_tokens=True)


def rows_of(model: LanguageModel) -> list[Row]:
    """Completions of different lengths after prompts of one, two and no pictures."""
    first = prompt_with(model, 0)
    completions = [tokens[:n] for tokens, n in zip(_words(5), (5, 9, 3, 7, 4), strict=True)]
    prompts = [first, prompt_with(model, 1, 2), first, [20, 21, 22, 23], prompt_with(model, 4)]
    return list(zip(prompts, completions, strict=True))


def _words(number: int) -> list[list[int]]:
    return [[10 + token % 54 for token in row] for row in random_tokens(*[9] * number, seed=3)]


def reference_logprobs(model: LanguageModel, row: Row) -> torch.Tensor:
    """One row through transformers' own forward pass, pixels and all."""
    prompt, completion = row
    ids = torch.tensor([[*prompt, *completion]])
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if isinstance(prompt, PicturedPrompt):
        assert model.vision is not None
        inputs |= model.vision.pixels(prompt.pictures)
        if "image_grid_thw" in inputs:
            inputs["mm_token_type_ids"] = (ids == model.model.config.image_token_id).int()
    logits = model.model(**inputs, use_cache=False).logits[0, len(prompt) - 1 : -1]
    logprobs = (logits.float() / TEMPERATURE).log_softmax(-1)
    return logprobs.gather(1, torch.tensor(completion)[:, None])[:, 0]


def scorer_of(model: LanguageModel, tokens_per_batch: int = 10_000) -> Scorer:
    return Scorer(model, temperature=TEMPERATURE, tokens_per_batch=tokens_per_batch)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_transformers_alone_and_in_a_batch(family):
    model = tiny_seeing_model(family)
    rows = rows_of(model)
    with torch.no_grad():
        expected = [reference_logprobs(model, row) for row in rows]
    prompts, completions = zip(*rows, strict=True)
    together = scorer_of(model).score(prompts, completions)
    alone = scorer_of(model, 1).score(prompts, completions)
    for ours, one, theirs in zip(together, alone, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
        torch.testing.assert_close(one, theirs, atol=1e-5, rtol=0)
    # What is seen decides: with another picture in its place the scores are others.
    other = PicturedPrompt(prompts[0], [picture(9)])
    (changed,) = scorer_of(model).score([other], completions[:1])
    assert (changed - expected[0]).abs().max() > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_sampled_logprobs_are_the_scorers(family):
    model = tiny_seeing_model(family)
    assert model.vision is not None
    prompts = [prompt_with(model, 0), prompt_with(model, 1, 2, words="w30"), [20, 21, 22]]
    settings: dict[str, Any] = {
        "group_size": 6, "max_completion_tokens": 24, "temperature": TEMPERATURE, "seed": 1
    }  # fmt: skip
    groups = sample(model, prompts, **settings)
    # The same tokens where each prompt is decoded in a batch of its own.
    alone = sample(model, prompts[:1], **settings)[0]
    assert [one.token_ids for one in alone] == [one.token_ids for one in groups[0]]
    asked = [prompt for prompt in prompts for _ in range(6)]
    written = [completion for group in groups for completion in group]
    scores = scorer_of(model).score(asked, [one.token_ids for one in written])
    for completion, values in zip(written, scores, strict=True):
        torch.testing.assert_close(torch.tensor(completion.logprobs), values, atol=2e-5, rtol=0)
        assert not set(completion.token_ids) & set(model.vision.placeholder_ids)
    assert any(EOS in one.token_ids for one in written)


@pytest.mark.parametrize(
    ("family", "kind"), [("llava", "image"), ("qwen2_vl", "image"), ("qwen3_vl", "video")]
)
def test_no_placeholder_is_written_though_it_is_likeliest(family, kind):
    model = tiny_seeing_model(family)
    assert model.vision is not None
    with torch.no_grad():
        model.model.lm_head.weight[getattr(model.model.config, f"{kind}_token_id")] *= 0
        model.model.lm_head.weight[3:] *= 1e-3
        model.model.lm_head.weight[:2] *= 1e-3
    prompt = prompt_with(model, 0)
    for temperature in (0.0, 1.0):
        (group,) = sample(
            model, [prompt], group_size=32, max_completion_tokens=8, temperature=temperature, seed=0
        )
        written = {token for one in group for token in one.token_ids}
        assert not written & set(model.vision.placeholder_ids)
        # The log-prob is that of the whole vocabulary: near 1 / 64, not 1 / 63.
        values = [value for one in group for value in one.logprobs]
        scores = Scorer(model, temperature=1.0, tokens_per_batch=10_000).score(
            [prompt] * 32, [one.token_ids for one in group]
        )
        torch.testing.assert_close(torch.tensor(values), torch.cat(scores), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_completion_with_a_placeholder_is_a_sentence(family):
    """As another program may have written it; alone it would be taken for a picture's place."""
    model = tiny_seeing_model(family)
    token = model.model.config.image_token_id
    assert not model.can_read([20, token, 21]) and not model.can_read([20, 64])
    assert model.can_read([20, 21])
    prompts = [prompt_with(model, 0), [20, 21]]
    for completions in ([[20, token], [21]], [[20], [21, token, 22]]):
        with pytest.raises(UserError, match=r"completion, .* holds '<.*>', in whose place"):
            scorer_of(model).score(prompts, completions)


def _gradients(model: LanguageModel, rows: list[Row], size: int) -> dict[str, torch.Tensor]:
    model.model.zero_grad()
    for parameter in model.model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    scorer = scorer_of(model)
    for start in range(0, len(rows), size):
        prompts, completions = zip(*rows[start : start + size], strict=True)
        with scorer.gradient_in_place():
            scores = scorer(prompts, completions)
        scores.logprobs.sum().backward()
    return {
        name: parameter.grad.clone()
        for name, parameter in model.model.named_parameters()
        if parameter.grad is not None
    }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("train_vision", [False, True])
def test_gradient_of_a_batch_is_the_sum_of_its_rows(family, train_vision):
    model = tiny_seeing_model(family)
    assert model.vision is not None
    model.vision.keeps_features = not train_vision
    if not train_vision:
        freeze_vision(model.model)
    rows = rows_of(model)
    together = _gradients(model, rows, len(rows))
    alone = _gradients(model, rows, 1)
    assert together.keys() == alone.keys()
    for name, values in together.items():
        torch.testing.assert_close(values, alone[name], atol=2e-4, rtol=1e-4, msg=name)
    moved = {name for name, values in together.items() if values.abs().max() > 0}
    sees = {name for name in moved if "vision" in name or "visual" in name}
    assert bool(sees) == train_vision
    # And it is that of transformers' own forward pass.
    model.model.zero_grad()
    for row in rows:
        reference_logprobs(model, row).sum().backward()
    for name, parameter in model.model.named_parameters():
        if name in together:
            # A layer that nothing reads has none.
            expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            torch.testing.assert_close(together[name], expected, atol=2e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_changes_nothing(family):
    model = tiny_seeing_model(family)
    freeze_vision(model.model)
    rows = rows_of(model)
    plain = _gradients(model, rows, len(rows))
    model.model.gradient_checkpointing_enable()
    model.model.train()
    checkpointed = _gradients(model, rows, len(rows))
    assert checkpointed.keys() == plain.keys()
    for name, values in plain.items():
        torch.testing.assert_close(checkpointed[name], values, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_near_float32(family):
    exact = tiny_seeing_model(family)
    rough = tiny_seeing_model(family, dtype=torch.bfloat16)
    prompts, completions = zip(*rows_of(exact), strict=True)
    ours = torch.cat(scorer_of(rough).score(prompts, completions))
    theirs = torch.cat(scorer_of(exact).score(prompts, completions))
    assert (ours - theirs).abs().mean() < 0.1


def test_a_model_of_texts_alone_is_named():
    from tiny_models import tiny_language_model

    seeing = tiny_seeing_model("llava")
    blind = tiny_language_model()
    with pytest.raises(UserError, match="tiny-llama' reads only text"):
        scorer_of(blind).score([prompt_with(seeing, 0)], [[20, 21]])
