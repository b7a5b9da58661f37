"""Divergences in tiles against the whole matrices of logits, and against TRL's distillation."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from rlad.objectives.divergences import generalised_jsd
from rlad.scoring.distributions import Distributions
from rlad.scoring.scorer import Scorer
from rlad.scoring.token_divergence import token_divergence
from tiny_models import LargestTensor, random_tokens, tiny_language_model

BETAS = [0.0, 0.3, 0.5, 1.0]
TILES = [(1, 1), (5, 23), (37, 4), (10, 7), (256, 256)]


def distributions(
    seed: int, num_tokens: int = 37, hidden: int = 8, vocabulary: int = 23, **readout: Any
) -> Distributions:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((num_tokens, hidden), (vocabulary, hidden), (vocabulary,))
    parts = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return Distributions(*parts, **readout)


def trainable(given: Distributions) -> tuple[Distributions, list[Tensor]]:
    leaves = [part.clone().requires_grad_() for part in given[:3] if part is not None]
    return given._replace(**dict(zip(("hidden", "weight", "bias"), leaves, strict=False))), leaves


def direct(student: Distributions, teacher: Distributions, beta: float) -> Tensor:
    """By autograd from all logits."""
    logprobs = []
    for each in (student, teacher):
        logits = each.hidden @ each.weight.T + (0 if each.bias is None else each.bias)
        logits = logits * each.scale
        if each.soft_cap is not None:
            logits = each.soft_cap * torch.tanh(logits / each.soft_cap)
        logprobs.append((logits / each.temperature).log_softmax(dim=-1))
    return generalised_jsd(*logprobs, beta=beta)[0].sum(dim=-1)


def ours(student: Distributions, teacher: Distributions, beta: float, **tile: Any) -> Tensor:
    return token_divergence(student, teacher, partial(generalised_jsd, beta=beta), **tile)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("beta", BETAS)
def test_values_and_gradients_are_those_of_all_logits(beta: float, tile: tuple[int, int]) -> None:
    """The teacher is wider, has another output layer, and receives no gradient."""
    student, leaves = trainable(distributions(0, scale=0.7, soft_cap=3.0, temperature=0.6))
    teacher, of_teacher = trainable(distributions(1, hidden=5, scale=0.5, temperature=0.6))
    generator = torch.Generator().manual_seed(2)
    upstream = torch.randn(37, generator=generator, dtype=torch.float64)
    expected, values = direct(student, teacher, beta), ours(student, teacher, beta, tile=tile)
    assert torch.allclose(values, expected, rtol=0, atol=1e-13)
    wanted = torch.autograd.grad((expected * upstream).sum(), leaves)
    (values * upstream).sum().backward()
    for leaf, right in zip(leaves, wanted, strict=True):
        assert leaf.grad is not None and float(right.abs().max()) > 0.01
        assert torch.allclose(leaf.grad, right, rtol=1e-11, atol=1e-12)
    assert all(leaf.grad is None for leaf in of_teacher)


@pytest.mark.parametrize("beta", BETAS)
def test_gradcheck(beta: float) -> None:
    student, leaves = trainable(distributions(0, 5, 3, 4, soft_cap=2.0, temperature=0.7))
    teacher = distributions(1, 5, 2, 4, temperature=0.7)

    def divergence(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        given = student._replace(hidden=hidden, weight=weight, bias=bias)
        return ours(given, teacher, beta, tile=(2, 3))

    assert torch.autograd.gradcheck(divergence, leaves)


@pytest.mark.parametrize("beta", BETAS)
def test_a_teacher_that_is_the_student_gives_no_divergence_and_no_gradient(beta: float) -> None:
    student, leaves = trainable(distributions(0, temperature=0.7))
    values = ours(student, distributions(0, temperature=0.7), beta, tile=(10, 7))
    assert float(values.detach().abs().max()) < 1e-15
    values.sum().backward()
    assert all(float(leaf.grad.abs().max()) < 1e-13 for leaf in leaves if leaf.grad is not None)


def test_the_order_of_the_tokens_does_not_matter() -> None:
    student, teacher, order = distributions(0), distributions(1), torch.randperm(37)
    shuffled = [each._replace(hidden=each.hidden[order]) for each in (student, teacher)]
    values = ours(student, teacher, 0.5, tile=(10, 7))
    assert torch.allclose(ours(*shuffled, 0.5, tile=(10, 7)), values[order], rtol=0, atol=1e-14)


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_a_left_out_token_of_infinite_divergence_spoils_no_gradient(beta: float) -> None:
    """Both models rule an entry out, student at 0 and teacher at 1; selecting comes afterwards."""
    student, leaves = trainable(distributions(0))
    teacher = distributions(1)
    with torch.no_grad():
        which = student.bias if beta == 0 else teacher.bias
        assert which is not None
        which[3] = -math.inf
    values = ours(student, teacher, beta, tile=(10, 7))
    assert bool(values.isinf().all())
    torch.where(values.isfinite(), values, 0).sum().backward()
    assert all(bool((leaf.grad == 0).all()) for leaf in leaves if leaf.grad is not None)


def test_the_gradient_of_the_weights_can_be_added_to_a_sum() -> None:
    student, leaves = trainable(distributions(0))
    teacher, total = distributions(1), torch.ones(23, 8, dtype=torch.float64)
    expected = torch.autograd.grad(ours(student, teacher, 0.5).sum(), leaves)
    ours(student._replace(weight_grad=total), teacher, 0.5).sum().backward()
    assert leaves[1].grad is None
    assert torch.allclose(total - 1, expected[1], rtol=0, atol=1e-13)


def test_no_tokens() -> None:
    student, leaves = trainable(distributions(0, num_tokens=0))
    values = ours(student, distributions(1, num_tokens=0), 0.5)
    values.sum().backward()
    assert values.shape == (0,) and leaves[1].grad is not None


def test_memory_does_not_grow_with_tokens_times_vocabulary() -> None:
    student, _ = trainable(distributions(0, num_tokens=4096, hidden=4, vocabulary=512))
    teacher = distributions(1, num_tokens=4096, hidden=4, vocabulary=512)
    with LargestTensor() as largest:
        ours(student, teacher, 0.5, tile=(64, 256)).sum().backward()
    assert largest.num_elements == 64 * 256 == 4096 * 4  # a tile, and the hidden states


# --- through the models ---------------------------------------------------------------------------

PROMPTS = random_tokens(7, 3, 1, 12, 5, seed=1)
COMPLETIONS = random_tokens(4, 9, 6, 1, 8, seed=2)


def scorers(dtype: torch.dtype = torch.float64) -> tuple[Scorer, Scorer]:
    """Of a student, and of a wider teacher of another family."""
    models = (
        tiny_language_model("llama", dtype=dtype),
        tiny_language_model("gemma2", seed=1, dtype=dtype, hidden_size=48),
    )
    student, teacher = (Scorer(model, temperature=0.7, tokens_per_batch=1000) for model in models)
    return student, teacher


def scored(student: Scorer, teacher: Scorer, rows: list[int], beta: float = 0.5) -> list[Tensor]:
    """The divergences of each completion of a micro-batch."""
    prompts, completions = [PROMPTS[i] for i in rows], [COMPLETIONS[i] for i in rows]
    target = teacher.distributions(prompts, completions)
    scores = student(prompts, completions, divergence=lambda given: ours(given, target, beta))
    assert scores.divergence is not None
    assert bool((scores.divergence[~scores.mask] == 0).all())
    return [values[kept] for values, kept in zip(scores.divergence, scores.mask, strict=True)]


@pytest.mark.parametrize("beta", BETAS)
def test_every_token_is_compared_where_it_is_predicted(beta: float) -> None:
    student, teacher = scorers()
    for prompt, completion, values in zip(
        PROMPTS, COMPLETIONS, scored(student, teacher, list(range(5)), beta), strict=True
    ):
        ids = torch.tensor([prompt + completion])
        alone = [
            (scorer.model(input_ids=ids).logits[0, len(prompt) - 1 : -1] / 0.7).log_softmax(dim=-1)
            for scorer in (student, teacher)
        ]
        expected = generalised_jsd(*alone, beta=beta)[0].sum(dim=-1)
        assert torch.allclose(values, expected, rtol=0, atol=1e-11)


def test_padding_order_and_micro_batches_change_nothing() -> None:
    student, teacher = scorers()
    parameters = list(student.model.parameters())
    together = scored(student, teacher, [0, 1, 2, 3, 4])
    whole = torch.autograd.grad(torch.cat(together).sum(), parameters)
    parts = {
        i: values
        for rows in ([4], [2, 0], [3, 1])
        for i, values in zip(rows, scored(student, teacher, rows), strict=True)
    }
    apart = torch.autograd.grad(torch.cat([parts[i] for i in range(5)]).sum(), parameters)
    assert torch.allclose(
        torch.cat(together), torch.cat([parts[i] for i in range(5)]), rtol=0, atol=1e-12
    )
    assert all(map(partial(torch.allclose, rtol=1e-9, atol=1e-11), whole, apart))
