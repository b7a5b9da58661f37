"""Divergences over the likeliest entries and their tail: against all logits in slow loops, at the
ends, in tiles, of teachers that are mixtures."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from test_token_divergence import distributions, trainable
from torch import Tensor

import reference
from rlad.objectives.divergences import DivergenceName, divergence_of, with_tail
from rlad.scoring.distributions import Distributions, TokenDistributions
from rlad.scoring.mixtures import ArithmeticMixture, GeometricMixture, OneForEachToken
from rlad.scoring.token_divergence import token_divergence
from rlad.scoring.top_k import column_divergence, column_logprobs, likeliest, top_k_divergence
from tiny_models import LargestTensor

NAMES: dict[DivergenceName, float] = {"jsd": 0.5, "reverse_kl": 1.0, "forward_kl": 0.0}
TILES = [(1, 1), (5, 23), (37, 4), (10, 7), (256, 256)]
WHO = ["student", "teacher"]


def logprobs_of(given: Distributions) -> Tensor:
    logits = given.hidden @ given.weight.T + (0 if given.bias is None else given.bias)
    logits = logits * given.scale
    if given.soft_cap is not None:
        logits = given.soft_cap * torch.tanh(logits / given.soft_cap)
    return (logits / given.temperature).log_softmax(dim=-1)


def slow(student: Tensor, teacher: Tensor, ids: Tensor, beta: float) -> Tensor:
    """From log-probs over the whole vocabulary, one token and one outcome after the other."""
    values = []
    for row, theirs, chosen in zip(student, teacher.tolist(), ids.tolist(), strict=True):
        outcomes = reference.outcomes(list(row), theirs, chosen)
        values.append(reference.generalised_jsd(*outcomes, beta=beta))
    return torch.stack(values)


def ours(
    student: Distributions, teacher: TokenDistributions, name: Any, who: str, k: int, **tile: Any
) -> Tensor:
    chosen_by = {"student": student, "teacher": teacher}[who]
    return top_k_divergence(
        student, teacher, divergence_of(name), top_k=k, chosen_by=chosen_by, **tile
    )


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("who", WHO)
@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients_are_those_of_all_logits(
    name: Any, who: str, tile: tuple[int, int]
) -> None:
    student, leaves = trainable(distributions(0, scale=0.7, soft_cap=3.0, temperature=0.6))
    teacher, of_teacher = trainable(distributions(1, hidden=5, scale=0.5, temperature=0.6))
    upstream = torch.randn(37, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    both = logprobs_of(student), logprobs_of(teacher).detach()
    ids = both[WHO.index(who)].detach().topk(5).indices
    expected = slow(*both, ids, NAMES[name])
    values = ours(student, teacher, name, who, 5, tile=tile)
    assert torch.allclose(values, expected, rtol=0, atol=1e-13)
    wanted = torch.autograd.grad((expected * upstream).sum(), leaves)
    (values * upstream).sum().backward()
    for leaf, right in zip(leaves, wanted, strict=True):
        assert leaf.grad is not None and float(right.abs().max()) > 0.01
        assert torch.allclose(leaf.grad, right, rtol=1e-11, atol=1e-12)
    assert all(leaf.grad is None for leaf in of_teacher)


@pytest.mark.parametrize("who", WHO)
@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name: Any, who: str) -> None:
    student, leaves = trainable(distributions(0, 5, 3, 6, soft_cap=2.0, temperature=0.7))
    teacher = distributions(1, 5, 2, 6, temperature=0.7)
    ids = likeliest(student if who == "student" else teacher, 2, tile=(2, 3))
    columns, _ = column_logprobs(teacher, ids, tile=(2, 3))

    def divergence(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        given = student._replace(hidden=hidden, weight=weight, bias=bias)
        return column_divergence(given, ids, columns, divergence_of(name), tile=(2, 3))

    assert torch.autograd.gradcheck(divergence, leaves)


@pytest.mark.parametrize("who", WHO)
@pytest.mark.parametrize("name", NAMES)
def test_all_entries_are_the_whole_vocabulary(name: Any, who: str) -> None:
    """Value and gradient; the tail of nothing adds nothing, also in float32."""
    for dtype, bound in ((torch.float64, 1e-13), (torch.float32, 1e-4)):
        results = []
        for k in (0, 23):
            pair = [distributions(seed) for seed in (0, 1)]
            pair = [
                each._replace(hidden=each.hidden.to(dtype), weight=each.weight.to(dtype), bias=None)
                for each in pair
            ]
            student, leaves = trainable(pair[0])
            values = (
                ours(student, pair[1], name, who, k)
                if k
                else token_divergence(student, pair[1], divergence_of(name))
            )
            values.sum().backward()
            results.append([values.detach(), *(leaf.grad for leaf in leaves)])
        for whole, of_top_k in zip(*results, strict=True):
            torch.testing.assert_close(of_top_k, whole, rtol=bound, atol=bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("who", WHO)
@pytest.mark.parametrize("name", NAMES)
def test_a_teacher_that_is_the_student_gives_exactly_nothing(
    name: Any, who: str, dtype: torch.dtype
) -> None:
    given = distributions(0, temperature=0.7)
    parts: list[Any] = [part.to(dtype) for part in given[:3] if part is not None]
    teacher = Distributions(*parts, temperature=0.7)
    for k in (1, 5, 23, None):
        student, leaves = trainable(teacher)
        values = (
            ours(student, teacher, name, who, k, tile=(10, 7))
            if k
            else token_divergence(student, teacher, divergence_of(name), tile=(10, 7))
        )
        values.sum().backward()
        assert bool((values == 0).all())
        assert all(bool((leaf.grad == 0).all()) for leaf in leaves if leaf.grad is not None)


@pytest.mark.parametrize("name", NAMES)
def test_more_entries_tell_more_apart(name: Any) -> None:
    """Joining outcomes never raises an f-divergence; with K growing it rises to the whole one."""
    student, teacher = distributions(0), distributions(1)
    values = [float(ours(student, teacher, name, "student", k).sum()) for k in (1, 3, 8, 22, 23)]
    assert values == sorted(values) and values[0] < 0.9 * values[-1]


def test_a_tail_of_1e_30_is_not_lost() -> None:
    """Summed from its own entries: 1 minus the others would be 0 and the forward KL infinite."""
    student, teacher = (
        Distributions(
            torch.ones(1, 1, dtype=torch.float64),
            torch.tensor([[0.0], [-1.0], [bottom]], dtype=torch.float64),
        )
        for bottom in (-70.0, -60.0)
    )
    columns, _ = column_logprobs(student, torch.tensor([[0, 1]]), tile=(1, 2))
    assert float(columns[0, -1]) == pytest.approx(-70 - math.log(1 + math.exp(-1)), abs=1e-12)
    value = float(ours(student, teacher, "forward_kl", "student", 2))
    assert value == pytest.approx(10 * math.exp(-60) / (1 + math.exp(-1)), rel=1e-6, abs=1e-15)


@pytest.mark.parametrize("gap", [50.0, 100.0, 150.0])
@pytest.mark.parametrize("who", ["student", "teacher"])
@pytest.mark.parametrize("name", NAMES)
def test_a_tail_that_only_one_of_the_two_knows(name: Any, who: str, gap: float) -> None:
    """In float32, whose exp ends at 88: the tail is `gap` nats below the others for `who`, and as
    likely as they are for the other one."""
    logits = {
        True: torch.tensor([[0.3], [-1.0], [-gap], [-gap - 1]], dtype=torch.float64),
        False: torch.tensor([[-0.2], [0.1], [0.4], [-0.5]], dtype=torch.float64),
    }
    pair = [logits[who == one].clone().requires_grad_() for one in WHO]
    ids = torch.tensor([[0, 1]])
    both = [weight[:, 0].log_softmax(0)[None] for weight in pair]
    expected = slow(both[0], both[1].detach(), ids, NAMES[name])
    (wanted,) = torch.autograd.grad(expected.sum(), pair[0])

    ours = [weight.detach().float() for weight in pair]
    ours[0].requires_grad_()
    student, teacher = (Distributions(torch.ones(1, 1), weight) for weight in ours)
    for tile in ((1, 1), (8, 8)):
        columns, _ = column_logprobs(teacher, ids, tile=tile)
        value = column_divergence(student, ids, columns, divergence_of(name), tile=tile)
        (gradient,) = torch.autograd.grad(value.sum(), ours[0])
        assert float(value) == pytest.approx(float(expected), rel=1e-5)
        assert torch.allclose(gradient.double(), wanted, rtol=1e-5, atol=1e-6)
        whole = token_divergence(student, teacher, divergence_of(name), tile=tile)
        (of_whole,) = torch.autograd.grad(whole.sum(), ours[0])
        assert bool(of_whole.isfinite().all())


def test_missing_and_left_out_tokens() -> None:
    """A token without a distribution has no divergence, and spoils no other's gradient."""
    student, leaves = trainable(distributions(0, num_tokens=4))
    teacher = distributions(1, num_tokens=3).placed(torch.tensor([0, 1, 3]), 4)
    for who in WHO:
        values = ours(student, teacher, "jsd", who, 3)
        assert values.isnan().tolist() == [False, False, True, False]
        torch.where(values.isfinite(), values, 0).sum().backward()
        assert all(bool(leaf.grad.isfinite().all()) for leaf in leaves if leaf.grad is not None)
        assert leaves[0].grad is not None and bool((leaves[0].grad[2] == 0).all())


def test_no_tokens() -> None:
    student, leaves = trainable(distributions(0, num_tokens=0))
    ours(student, distributions(1, num_tokens=0), "jsd", "student", 3).sum().backward()
    assert leaves[1].grad is not None


def test_memory_does_not_grow_with_tokens_times_vocabulary() -> None:
    student, _ = trainable(distributions(0, num_tokens=4096, hidden=4, vocabulary=512))
    teacher = distributions(1, num_tokens=4096, hidden=4, vocabulary=512)
    with LargestTensor() as largest:
        ours(student, teacher, "jsd", "student", 7, tile=(64, 256)).sum().backward()
    assert largest.num_elements == 4096 * 8  # the columns and their tail; a tile is half of it


# --- what a teacher is made of --------------------------------------------------------------------


def test_mixtures_are_what_their_formulas_say() -> None:
    """q proportional to q0^.9 q1^.1, and q = .9 q0 + .1 q1, of models of different sizes."""
    first = distributions(1, hidden=5, temperature=0.6)
    second = distributions(2, hidden=9, scale=0.5, soft_cap=3.0, temperature=0.6)
    logprobs = [logprobs_of(each) for each in (first, second)]
    geometric = GeometricMixture([first, second], [0.9, 0.1])
    expected = (0.9 * logprobs[0] + 0.1 * logprobs[1]).log_softmax(-1)
    assert torch.allclose(geometric.logits().log_softmax(-1), expected, rtol=0, atol=1e-13)
    arithmetic = ArithmeticMixture([first, second], [math.log(0.9), math.log(0.1)], (10, 7))
    expected = (0.9 * logprobs[0].exp() + 0.1 * logprobs[1].exp()).log()
    assert torch.allclose(arithmetic.logits().log_softmax(-1), expected, rtol=0, atol=1e-13)
    owners = torch.arange(37) % 3 % 2
    either = OneForEachToken([first, second], owners)
    expected = torch.where((owners == 0)[:, None], *logprobs)
    found = torch.cat([either.logits(slice(i, i + 5)) for i in range(0, 37, 5)])
    assert torch.allclose(found.log_softmax(-1), expected, rtol=0, atol=1e-13)
    places = torch.arange(37) + torch.arange(37) // 10
    for each in (geometric, arithmetic, either):
        moved = each.placed(places, 50)
        assert torch.allclose(moved.logits()[places], each.logits(), rtol=0, atol=1e-13)
        assert int(moved.logits().isnan().all(dim=1).sum()) == 13


@pytest.mark.parametrize("name", NAMES)
def test_a_mixture_as_teacher(name: Any) -> None:
    student, _ = trainable(distributions(0))
    parts = [distributions(1), distributions(2)]
    mixture = GeometricMixture(parts, [0.99, 0.01])
    logits = sum(w * logprobs_of(part) for w, part in zip((0.99, 0.01), parts, strict=True))
    teacher = torch.as_tensor(logits).log_softmax(-1)
    ids = logprobs_of(student).detach().topk(4).indices
    expected = slow(logprobs_of(student), teacher, ids, NAMES[name])
    values = ours(student, mixture, name, "student", 4, tile=(10, 7))
    assert torch.allclose(values, expected, rtol=0, atol=1e-13)
    whole = token_divergence(student, mixture, divergence_of(name), tile=(10, 7))
    rows = zip(logprobs_of(student), teacher.tolist(), strict=True)
    slowly = torch.stack([reference.generalised_jsd(list(s), t, beta=NAMES[name]) for s, t in rows])
    assert torch.allclose(whole, slowly, rtol=0, atol=1e-13)


def test_columns_of_a_server_need_no_more_than_the_columns() -> None:
    """Given K log-probs in float32 alone, the tail is what is missing to 1."""
    student, teacher = distributions(0), distributions(1)
    exact = partial(ours, student, teacher, "jsd", "teacher", 4)
    ids = likeliest(teacher, 4, tile=(64, 64))
    given = column_logprobs(teacher, ids, tile=(64, 64))[0][:, :-1].float()
    values = column_divergence(student, ids, with_tail(given), divergence_of("jsd"))
    assert torch.allclose(values, exact(), rtol=0, atol=1e-6)
