"""Log-probs of given completions against one unpadded pass per sequence; micro-batches, memory,
precision."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlad.models.loading import LanguageModel, load_language_model
from rlad.scoring.output_layer import output_layer
from rlad.scoring.scorer import Scorer, batches_by_length
from rlad.teachers.base import TeacherRequest
from rlad.teachers.local import LocalTeacher
from tiny_models import VOCABULARY, LargestTensor, random_tokens, tiny_language_model

LINEAR: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied": {"tie_word_embeddings": True},
    "qwen3": {},
    "gpt2": {"tie_word_embeddings": True},
    "phi": {},
    "mistral": {"sliding_window": 5},
    "mamba": {},
}
TRANSFORMED: dict[str, tuple[dict[str, Any], float, float | None]] = {
    "gemma2": ({"final_logit_softcapping": 5.0, "sliding_window": 5}, 1.0, 5.0),
    "gemma2-tied": ({"final_logit_softcapping": 3.0, "tie_word_embeddings": True}, 1.0, 3.0),
    "cohere": ({"logit_scale": 0.3}, 0.3, None),
    "cohere-tied": ({"logit_scale": 0.25, "tie_word_embeddings": True}, 0.25, None),
    "granite": ({"logits_scaling": 3.0}, 1 / 3, None),
}
"""settings, and the scale and soft cap that they mean"""
FAMILIES = LINEAR | {family: settings for family, (settings, _, _) in TRANSFORMED.items()}
PROMPTS = random_tokens(7, 3, 1, 12, 5, seed=1)
COMPLETIONS = random_tokens(4, 9, 6, 1, 8, seed=2)


def model_of(family: str, **settings: Any) -> LanguageModel:
    return tiny_language_model(family.removesuffix("-tied"), **(FAMILIES[family] | settings))


def direct(
    model: LanguageModel, prompt: list[int], completion: list[int], temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropy by the definition: the sequence alone, all logits, one token after the
    other."""
    logits = model.model(input_ids=torch.tensor([prompt + completion])).logits[0]
    rows = [
        (logits[len(prompt) + t - 1] / temperature).log_softmax(dim=-1)
        for t in range(len(completion))
    ]
    logprobs = torch.stack([row[token] for row, token in zip(rows, completion, strict=True)])
    return logprobs, torch.stack([-(row.exp() * row).sum() for row in rows])


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_equals_one_unpadded_pass_per_sequence(family: str, temperature: float) -> None:
    model = model_of(family)
    scores = Scorer(model, temperature=temperature, tokens_per_batch=1000)(PROMPTS, COMPLETIONS)
    for i, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        logprobs, entropy = direct(model, prompt, completion, temperature)
        assert scores.mask[i].sum() == len(completion)
        assert torch.allclose(scores.logprobs[i][scores.mask[i]], logprobs, rtol=0, atol=1e-5)
        assert torch.allclose(scores.entropy[i][scores.mask[i]], entropy, rtol=0, atol=1e-5)
    assert (scores.logprobs[~scores.mask] == 0).all()
    assert (scores.entropy[~scores.mask] == 0).all()


def test_the_output_layer_is_that_of_the_model() -> None:
    for family in FAMILIES:
        head = output_layer(model_of(family).model)
        assert head is not None and head.scale == pytest.approx(
            TRANSFORMED.get(family, ({}, 1.0, None))[1]
        ), family
        assert head.soft_cap == TRANSFORMED.get(family, ({}, 1.0, None))[2], family


def test_logits_that_are_not_those_of_the_config_are_taken_whole() -> None:
    """HyperCLOVA X multiplies by the setting by which Granite divides: no output layer that we
    know, right log-probs anyway."""
    model = tiny_language_model("hyperclovax", logits_scaling=3.0)
    assert output_layer(model.model) is None
    for values, prompt, completion in zip(
        Scorer(model, temperature=0.7, tokens_per_batch=1000).score(PROMPTS, COMPLETIONS),
        PROMPTS,
        COMPLETIONS,
        strict=True,
    ):
        assert torch.allclose(values, direct(model, prompt, completion, 0.7)[0], rtol=0, atol=1e-5)


def test_a_model_that_is_its_own_base_is_scored_from_its_logits() -> None:
    model = tiny_language_model(
        "llama4_text", num_local_experts=2, intermediate_size_mlp=64, num_experts_per_tok=1
    )
    assert model.model.base_model is model.model and output_layer(model.model) is None
    scores = Scorer(model, temperature=0.7, tokens_per_batch=1000).score(PROMPTS, COMPLETIONS)
    for values, prompt, completion in zip(scores, PROMPTS, COMPLETIONS, strict=True):
        assert torch.allclose(values, direct(model, prompt, completion, 0.7)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "hyperclovax"])
@torch.no_grad()
def test_logits_in_chunks_are_the_models_own(family: str) -> None:
    model = tiny_language_model(family, **FAMILIES.get(family, {"logits_scaling": 3.0}))
    text = random_tokens(11, seed=3)[0]
    whole = model.model(input_ids=torch.tensor([text])).logits[0] / 0.7
    chunks = list(
        Scorer(model, temperature=0.7, tokens_per_batch=1).logits_in_chunks(
            text, start=3, chunk_tokens=5
        )
    )
    assert [len(chunk) for chunk in chunks] == [5, 3] and torch.allclose(
        torch.cat(chunks), whole[2:-1], rtol=0, atol=1e-5
    )


def test_no_token_of_a_completion_sees_itself_or_a_later_one() -> None:
    """The one-token shift: the last token is predicted from what stands before it, and predicts
    nothing."""
    scorer = Scorer(model_of("llama"), temperature=1.0, tokens_per_batch=1000)
    prompt, completion = PROMPTS[0], COMPLETIONS[1]
    (before,) = scorer.score([prompt], [completion])
    for position in range(len(completion)):
        changed = list(completion)
        changed[position] = changed[position] % (VOCABULARY - 4) + 4
        (after,) = scorer.score([prompt], [changed])
        assert torch.equal(after[:position], before[:position])
        assert (after[position:] != before[position:]).all()


def test_the_prompt_is_seen_but_not_scored() -> None:
    scorer = Scorer(model_of("llama"), temperature=1.0, tokens_per_batch=1000)
    (whole,) = scorer.score([[5]], [[6, 7, 8]])
    (part,) = scorer.score([[5, 6]], [[7, 8]])
    assert torch.allclose(part, whole[1:], atol=1e-6)


def test_temperature_divides_the_logits_of_every_model_alike() -> None:
    """One rule for student, teacher and reference: at temperature 2 the log-odds of two tokens are
    halved."""
    model = model_of("llama")
    for temperature in (1.0, 2.0):
        scorer = Scorer(model, temperature=temperature, tokens_per_batch=1000)
        teacher = LocalTeacher(model, temperature=temperature, tokens_per_batch=1000)
        (one,), (other,) = scorer.score([[5]], [[6]]), scorer.score([[5]], [[9]])
        assert torch.equal(teacher.logprobs([TeacherRequest([5], [6])])[0], one)
        log_odds = float(one - other) * temperature
    logits = model.model(input_ids=torch.tensor([[5]])).logits[0, 0].detach()
    assert log_odds == pytest.approx(float(logits[6] - logits[9]), abs=1e-5)


# --- micro-batches --------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 300), max_size=40), st.integers(1, 1000))
def test_micro_batches_hold_every_row_once_within_the_budget(
    lengths: list[int], budget: int
) -> None:
    batches = batches_by_length(lengths, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget
    if budget >= 300 * 40:
        assert len(batches) <= 1


@pytest.mark.parametrize("tokens_per_batch", [1, 20, 40, 1000])
def test_scores_come_back_in_the_order_given(tokens_per_batch: int) -> None:
    model = model_of("llama")
    scores = Scorer(model, temperature=1.0, tokens_per_batch=tokens_per_batch).score(
        PROMPTS, COMPLETIONS
    )
    for values, prompt, completion in zip(scores, PROMPTS, COMPLETIONS, strict=True):
        assert torch.allclose(values, direct(model, prompt, completion)[0], rtol=0, atol=1e-5)
        assert not values.requires_grad
    assert Scorer(model, temperature=1.0, tokens_per_batch=10).score([], []) == []


def test_empty_completions_and_prompts() -> None:
    scorer = Scorer(model_of("llama"), temperature=1.0, tokens_per_batch=1000)
    empty, full = scorer.score([[5, 6], [5, 6]], [[], [7]])
    assert (len(empty), len(full)) == (0, 1)
    with pytest.raises(ValueError, match="a prompt has no tokens"):
        scorer.score([[5], []], [[6], [7]])


# --- gradients ------------------------------------------------------------------------------------


def gradients(model: LanguageModel, loss: Tensor) -> dict[str, Tensor]:
    model.model.zero_grad()
    loss.backward()
    return {
        name: p.grad.clone() for name, p in model.model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("family", ["gpt2", "llama-tied", *TRANSFORMED])
def test_the_gradient_is_that_of_the_definition(family: str) -> None:
    model = model_of(family, dtype=torch.float64)
    scores = Scorer(model, temperature=0.8, tokens_per_batch=1000)(PROMPTS, COMPLETIONS)
    weights = torch.randn(
        scores.logprobs.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    ours = gradients(model, (scores.logprobs * weights).sum())
    loss = torch.zeros((), dtype=torch.float64)
    for i, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        loss = (
            loss + (direct(model, prompt, completion, 0.8)[0] * weights[i, : len(completion)]).sum()
        )
    expected = gradients(model, loss)
    # The norms of Llama and Gemma compute in float32 whatever the model's type, GPT-2's do not.
    tolerance = 1e-12 if family == "gpt2" else 1e-6
    assert ours.keys() == expected.keys()
    for name, wanted in expected.items():
        assert float((ours[name] - wanted).norm() / wanted.norm()) < tolerance, name


WITH_DROPOUT: dict[str, dict[str, Any]] = {
    "llama": {"attention_dropout": 0.5},
    "gpt2": {"resid_pdrop": 0.5, "attn_pdrop": 0.5},
    "opt": {"dropout": 0.5, "layerdrop": 0.5, "ffn_dim": 64, "word_embed_proj_dim": 32},
    "xglm": {
        "d_model": 32,
        "ffn_dim": 64,
        "attention_heads": 4,
        "num_layers": 2,
        "activation_dropout": 0.5,
    },
    "mixtral": {"num_local_experts": 4, "router_jitter_noise": 0.5},
}


@pytest.mark.parametrize("family", WITH_DROPOUT)
def test_checkpointing_gives_the_same_gradient_although_the_model_has_dropout(
    family: str, tmp_path: Path
) -> None:
    """Checkpointing needs training mode, in which dropout would make student and old policy two
    functions."""
    saved = tiny_language_model(family, **WITH_DROPOUT[family])
    saved.model.save_pretrained(tmp_path)
    saved.tokenizer.save_pretrained(tmp_path)
    results = []
    for checkpointing in (False, True):
        model = load_language_model(str(tmp_path), device="cpu", trainable=True)
        if checkpointing:
            model.model.gradient_checkpointing_enable()
        model.model.train(checkpointing)
        scores = Scorer(model, temperature=1.0, tokens_per_batch=1000)(PROMPTS, COMPLETIONS)
        results.append((scores.logprobs.detach(), gradients(model, scores.logprobs.sum())))
    (plain, plain_gradients), (checkpointed, its_gradients) = results
    assert torch.equal(plain, checkpointed)
    for name, wanted in plain_gradients.items():
        assert torch.equal(its_gradients[name], wanted), name


# --- precision ------------------------------------------------------------------------------------


def test_a_student_that_computes_in_bfloat16_stays_close() -> None:
    """Float32 weights under autocast. bfloat16 keeps 8 bits, so a logit of size x is off by x/2^8
    and, through two layers, a few times that; the weights and their gradient stay float32."""
    exact = model_of("llama")
    rough = LanguageModel(
        exact.name, exact.model, exact.tokenizer, exact.eos_token_ids, 0, torch.bfloat16
    )
    scores = {
        model: Scorer(model, temperature=1.0, tokens_per_batch=1000)(PROMPTS, COMPLETIONS)
        for model in (exact, rough)
    }
    mask = scores[exact].mask
    difference = (scores[rough].logprobs - scores[exact].logprobs)[mask].abs().detach()
    assert scores[rough].logprobs.dtype == torch.float32
    assert float(difference.max()) < 0.1
    assert float(difference.mean()) < 0.02
    wanted, ours = (gradients(exact, scores[model].logprobs.sum()) for model in (exact, rough))
    for name, gradient in ours.items():
        assert gradient.dtype == torch.float32
        assert float((gradient - wanted[name]).norm() / wanted[name].norm()) < 0.05, name


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab_size", [4000, 4096])
def test_a_teacher_never_holds_batch_times_tokens_times_vocabulary(vocab_size: int) -> None:
    """Also where its vocabulary is padded beyond that of the student, whose ids end at 4000."""
    model = tiny_language_model("llama", vocab_size=vocab_size)
    teacher = LocalTeacher(model, temperature=1.0, tokens_per_batch=10_000)
    prompts = random_tokens(*[10] * 16, seed=1, vocabulary=4000)
    completions = random_tokens(*[100] * 16, seed=2, vocabulary=4000)
    with LargestTensor() as largest:
        scores = teacher.logprobs(list(map(TeacherRequest, prompts, completions)))
    # One tile of the logits of 1600 tokens.
    assert largest.num_elements == 724 * 724 <= 2**19 < 1600 * vocab_size
    assert torch.allclose(scores[3], direct(model, prompts[3], completions[3])[0], atol=1e-5)


@pytest.mark.parametrize("family", ["llama", *TRANSFORMED])
def test_training_never_holds_batch_times_tokens_times_vocabulary(family: str) -> None:
    model = model_of(family, vocab_size=8192)
    scorer = Scorer(model, temperature=1.0, tokens_per_batch=10_000)
    prompts, completions = random_tokens(*[10] * 8, seed=1), random_tokens(*[100] * 8, seed=2)
    with LargestTensor() as largest:
        scorer(prompts, completions).logprobs.sum().backward()
    assert largest.num_elements == 724 * 724 <= 2**19 < 800 * 8192


def test_a_teacher_has_no_gradient() -> None:
    model = model_of("llama")
    teacher = LocalTeacher(model, temperature=1.0, tokens_per_batch=1000)
    assert not any(p.requires_grad for p in model.model.parameters())
    assert teacher.identity == "tiny-llama"
