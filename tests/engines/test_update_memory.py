"""What an update makes beside weights, gradient and moments does not grow with the vocabulary; its
gradient is right."""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch

from parity_cases import WordTask, nearby
from rlad.config.run import RunConfig
from rlad.engines.metrics import TokenStats
from rlad.engines.native.loop import NativeEngine
from rlad.scoring.tiles import LOGITS_PER_TILE
from rlad.teachers.local import LocalTeacher
from tiny_models import LargestTensor, tiny_language_model

VOCABULARY = 3000


def engine_of(
    *,
    tied: bool,
    dtype: torch.dtype = torch.float32,
    compute_dtype: torch.dtype | None = None,
    objective: dict[str, Any] | None = None,
) -> NativeEngine:
    """On-policy distillation: every token of every completion has a gradient, whatever its
    reward."""
    config = RunConfig.model_validate(
        {
            "student": {"model": "tiny"},
            "teacher": {"model": "tiny"},
            "task": {"type": "knights_and_knaves"},
            "objective": objective or {"type": "opd"},
            "rollout": {"prompts_per_batch": 2, "group_size": 4, "max_completion_tokens": 12},
            "optimization": {"tokens_per_batch": 40, "learning_rate": 1e-3},
        }
    )
    student = tiny_language_model(
        "llama", vocab_size=VOCABULARY, tie_word_embeddings=tied, dtype=dtype
    )
    student = replace(student, compute_dtype=compute_dtype or dtype)
    teacher = LocalTeacher(nearby(student, seed=1), temperature=1.0, tokens_per_batch=40)
    return NativeEngine(config, student=student, task=WordTask(), teacher=teacher)


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_an_update_makes_no_matrix_of_the_size_of_the_embeddings(
    monkeypatch: pytest.MonkeyPatch, tied: bool, compute_dtype: torch.dtype
) -> None:
    monkeypatch.setitem(LOGITS_PER_TILE, "cpu", 2**10)
    engine = engine_of(tied=tied, compute_dtype=compute_dtype)
    matrix = VOCABULARY * engine.student.model.config.hidden_size
    batch = engine.make_rollout_batch(0)
    with LargestTensor() as first:
        engine.update(batch, range(2))
    assert first.num_elements == matrix  # the gradient itself, as zeros, and the moments
    with LargestTensor() as second:
        engine.update(batch, range(2))
    assert second.num_elements < matrix / 5


@pytest.mark.parametrize("support", ["full", "student_top_k", "teacher_top_k"])
@pytest.mark.parametrize("name", ["gkd", "sdpo"])
def test_nor_does_one_that_compares_distributions(
    monkeypatch: pytest.MonkeyPatch, name: str, support: str
) -> None:
    monkeypatch.setitem(LOGITS_PER_TILE, "cpu", 2**13)
    engine = engine_of(tied=False, objective={"type": name, "support": support, "top_k": 5})
    matrix = VOCABULARY * engine.student.model.config.hidden_size
    batch = engine.make_rollout_batch(0)
    engine.update(batch, range(2))
    with LargestTensor() as second:
        engine.update(batch, range(2))
    assert second.num_elements < matrix / 5


@pytest.mark.parametrize("tied", [True, False])
def test_the_gradient_is_that_of_all_logits_by_autograd(
    monkeypatch: pytest.MonkeyPatch, tied: bool
) -> None:
    """Over several micro-batches and tiles, and once more on top of what is in `.grad`."""
    monkeypatch.setitem(LOGITS_PER_TILE, "cpu", 2**10)
    ours, plain = (engine_of(tied=tied, dtype=torch.float64) for _ in range(2))
    plain.scorer.head = None
    plain.scorer.gradient_in_place = nullcontext
    batch = ours.make_rollout_batch(0)
    assert len(ours.scorer.batches(batch.prompts, batch.completions)) > 2
    for engine in (ours, ours, plain):
        engine.accumulate_gradient(batch, range(8), TokenStats())
    gradients, expected = (
        dict(engine.student.model.named_parameters()) for engine in (ours, plain)
    )
    assert gradients.keys() == expected.keys() and ("lm_head.weight" in expected) == (not tied)
    for name, parameter in expected.items():
        assert parameter.grad is not None
        torch.testing.assert_close(
            gradients[name].grad, parameter.grad, rtol=1e-11, atol=1e-13, msg=name
        )
        assert float(parameter.grad.abs().max()) > 1e-5, name


def test_gradients_outside_of_the_update_are_as_before() -> None:
    engine = engine_of(tied=False)
    engine.update(engine.make_rollout_batch(0), range(2))
    model = engine.student.model
    matrices = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    for gradient in torch.autograd.grad(engine.scorer([[5, 6]], [[7, 8]]).logprobs.sum(), matrices):
        assert not gradient.is_sparse and float(gradient.abs().max()) > 0
