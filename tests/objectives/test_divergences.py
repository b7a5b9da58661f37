"""Terms and slopes of the divergences over the vocabulary, and the losses of `gkd` and `sft`."""

import math

import pytest
import torch
from torch import Tensor

from reference import generalised_jsd as slow_jsd
from rlad.objectives.divergences import (
    clipped_divergence_of,
    divergence_of,
    generalised_jsd,
    num_clipped,
    sampled_divergence,
    with_tail,
)
from rlad.objectives.gkd import gkd_loss
from rlad.objectives.sft import sft_loss

INF, NAN = math.inf, math.nan
BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]


def logits(seed: int, tokens: int = 4, vocabulary: int = 9) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(tokens, vocabulary, generator=generator, dtype=torch.float64)


def divergence(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """From logits, by autograd through the terms."""
    return generalised_jsd(student.log_softmax(-1), teacher.log_softmax(-1), beta=beta)[0].sum(-1)


@pytest.mark.parametrize("beta", BETAS)
def test_value_and_gradient_equal_the_slow_reference(beta: float) -> None:
    student, teacher = logits(0).requires_grad_(), logits(1)
    rows = zip(student.log_softmax(-1), teacher.log_softmax(-1).tolist(), strict=True)
    expected = torch.stack([slow_jsd(list(s), t, beta=beta) for s, t in rows])
    assert torch.allclose(divergence(student, teacher, beta), expected, rtol=0, atol=1e-14)
    (wanted,) = torch.autograd.grad(expected.sum(), student)
    with torch.no_grad():
        logprobs = student.log_softmax(-1)
        _, slopes = generalised_jsd(logprobs, teacher.log_softmax(-1), beta=beta)
        ours = slopes - logprobs.exp() * slopes.sum(-1, keepdim=True)
    assert torch.allclose(ours, wanted, rtol=0, atol=1e-14) and float(wanted.abs().max()) > 0.01


def test_by_hand() -> None:
    """πS = (3/4, 1/4), πT = (1/2, 1/2), so m = (5/8, 3/8) at beta 1/2."""
    student, teacher = (
        torch.tensor(p, dtype=torch.float64).log() for p in ([0.75, 0.25], [0.5, 0.5])
    )
    for beta, wanted in (
        (0.0, 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)),
        (1.0, 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)),
        (
            0.5,
            0.5 * (0.5 * math.log(4 / 5) + 0.5 * math.log(4 / 3))
            + 0.5 * (0.75 * math.log(6 / 5) + 0.25 * math.log(2 / 3)),
        ),
    ):
        assert float(generalised_jsd(student, teacher, beta=beta)[0].sum()) == pytest.approx(
            wanted, abs=1e-15
        )


def test_near_the_ends_it_is_beta_times_the_kl_of_the_end() -> None:
    """JSD_beta / beta -> KL(πT || πS) for beta -> 0, JSD_beta / (1 - beta) -> KL(πS || πT)."""
    student, teacher, small = logits(0), logits(1), 1e-6
    forward, reverse = (divergence(student, teacher, beta) for beta in (0.0, 1.0))
    assert torch.allclose(divergence(student, teacher, small) / small, forward, rtol=1e-4)
    assert torch.allclose(divergence(student, teacher, 1 - small) / small, reverse, rtol=1e-4)


def test_swapping_the_models_swaps_beta() -> None:
    student, teacher = logits(0), logits(1)
    for beta in BETAS:
        swapped = divergence(teacher, student, 1 - beta)
        assert torch.allclose(divergence(student, teacher, beta), swapped, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("beta", BETAS)
def test_a_teacher_that_agrees_gives_nothing(beta: float, dtype: torch.dtype) -> None:
    logprobs = logits(0).to(dtype).log_softmax(-1)
    terms, slopes = generalised_jsd(logprobs, logprobs, beta=beta)
    assert bool((terms == 0).all()) and bool((slopes == 0).all())


@pytest.mark.parametrize("beta", BETAS)
def test_the_vocabulary_in_parts_is_the_whole(beta: float) -> None:
    student, teacher = (logits(seed).log_softmax(-1) for seed in (0, 1))
    whole = generalised_jsd(student, teacher, beta=beta)
    parts = [
        generalised_jsd(student[:, part], teacher[:, part], beta=beta)
        for part in (slice(0, 2), slice(2, 9))
    ]
    for values, of_parts in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(values, torch.cat(of_parts, dim=-1))


@pytest.mark.parametrize("beta", BETAS)
def test_an_entry_that_neither_model_can_take_changes_nothing(beta: float) -> None:
    student, teacher = logits(0), logits(1)
    expected = divergence(student, teacher, beta)
    student, teacher = (
        torch.cat([each, torch.full((4, 2), -INF)], dim=1) for each in (student, teacher)
    )
    assert torch.equal(divergence(student, teacher, beta), expected)
    _, slopes = generalised_jsd(student.log_softmax(-1), teacher.log_softmax(-1), beta=beta)
    assert bool((slopes[:, -2:] == 0).all())


def test_an_entry_that_one_model_cannot_take() -> None:
    """Infinite where the other model takes it in the KL towards the first; nothing is NaN."""
    impossible = torch.tensor([[0.0, 0.0, -INF]], dtype=torch.float64)
    possible = torch.zeros(1, 3, dtype=torch.float64)
    assert float(divergence(impossible, possible, 0.0)) == INF
    assert float(divergence(possible, impossible, 1.0)) == INF
    assert float(divergence(possible, impossible, 0.0)) == pytest.approx(math.log(1.5))
    assert float(divergence(impossible, possible, 1.0)) == pytest.approx(math.log(1.5))
    assert 0 < float(divergence(impossible, possible, 0.5)) < math.log(2)


@pytest.mark.parametrize("beta", BETAS)
def test_a_model_without_numbers_does_not_pass_for_agreement(beta: float) -> None:
    nothing = torch.full((1, 9), NAN, dtype=torch.float64)
    assert bool(divergence(logits(0, tokens=1), nothing, beta).isnan().all())
    assert bool(divergence(nothing, logits(0, tokens=1), beta).isnan().all())


# --- the sampled token, the tail, the bound of each term ------------------------------------------


@pytest.mark.parametrize("beta", BETAS)
def test_the_sampled_token_gives_value_and_gradient_in_expectation(beta: float) -> None:
    """The sum over all tokens y of πS(y) times the estimate at y, against the whole vocabulary."""
    student, teacher = logits(0).requires_grad_(), logits(1)
    expected = divergence(student, teacher, beta)
    (wanted,) = torch.autograd.grad(expected.sum(), student)
    logprobs = student.log_softmax(-1)
    measure = divergence_of("jsd", beta=beta) if 0 < beta < 1 else None
    measure = measure or divergence_of({0.0: "forward_kl", 1.0: "reverse_kl"}[beta])
    estimates = sampled_divergence(logprobs, teacher.log_softmax(-1), measure)
    value = (logprobs.detach().exp() * estimates).sum(-1)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    assert torch.allclose(value, expected, rtol=0, atol=1e-14)
    assert torch.allclose(gradient, wanted, rtol=0, atol=1e-14)


def test_the_sampled_token_by_hand() -> None:
    """πS(y) = 1/2, πT(y) = 1/4: values log 2, -log(2)/2, (log(4/3) + log(2/3)/2)/2."""
    for name, value, slope in (
        ("reverse_kl", math.log(2), math.log(2)),
        ("forward_kl", -math.log(2) / 2, 1 - 1 / 2),
        ("jsd", (math.log(4 / 3) + math.log(2 / 3) / 2) / 2, math.log(4 / 3) / 2),
    ):
        student = torch.tensor([0.5], dtype=torch.float64).log().requires_grad_()
        teacher = torch.tensor([0.25], dtype=torch.float64).log()
        estimate = sampled_divergence(student, teacher, divergence_of(name))
        estimate.sum().backward()
        assert student.grad is not None
        assert (estimate.item(), student.grad.item()) == pytest.approx((value, slope), abs=1e-15)


@pytest.mark.parametrize("name", ["jsd", "reverse_kl", "forward_kl"])
def test_a_sampled_token_on_which_both_agree_gives_exactly_nothing(name) -> None:
    student = torch.tensor([-0.1, -3.0, -700.0], requires_grad=True)
    estimate = sampled_divergence(student, student.detach(), divergence_of(name))
    (gradient,) = torch.autograd.grad(estimate.sum(), student)
    assert bool((estimate == 0).all()) and bool((gradient == 0).all())


def test_a_divergence_of_several_tokens_as_advantage_has_no_expected_gradient() -> None:
    """Why it is refused: E_y[D ∇log πS(y)] = D E_y[∇log πS(y)] = 0, since D does not depend on the
    sampled y. The log-ratio of the sampled token does, and gives the gradient of the reverse KL."""
    student, teacher = logits(0).requires_grad_(), logits(1)
    logprobs, theirs = student.log_softmax(-1), teacher.log_softmax(-1)
    probs = logprobs.detach().exp()
    top = logprobs.detach().topk(3).indices
    outcomes = [with_tail(each.gather(-1, top)) for each in (logprobs.detach(), theirs)]
    of_top_k = generalised_jsd(*outcomes, beta=1.0)[0].sum(-1, keepdim=True)
    for advantage, is_nothing in ((-of_top_k, True), (theirs - logprobs.detach(), False)):
        surrogate = -(probs * advantage * logprobs).sum()
        (gradient,) = torch.autograd.grad(surrogate, student, retain_graph=True)
        assert (float(gradient.abs().max()) < 1e-15) is is_nothing
    (exact,) = torch.autograd.grad(divergence(student, teacher, 1.0).sum(), student)
    assert torch.allclose(gradient, exact, rtol=0, atol=1e-14)


def test_the_tail_is_the_rest_and_never_nothing() -> None:
    probs = torch.tensor([[0.5, 0.25], [0.75, 0.25], [0.75, 0.2500001]])
    tail = with_tail(probs.log()).exp()[:, -1]
    assert tail.tolist() == pytest.approx([0.25, 1e-7, 1e-7], rel=1e-5)


@pytest.mark.parametrize("name", ["jsd", "reverse_kl", "forward_kl"])
def test_bounded_terms(name) -> None:
    """The gradient is that of sum_v min(term_v, bound) by autograd; straight-through it is that of
    the terms without bound."""
    student, teacher, bound = logits(0).requires_grad_(), logits(1), 0.05
    terms = divergence_of(name)(student.log_softmax(-1), teacher.log_softmax(-1))[0]
    (wanted,) = torch.autograd.grad(terms.clamp(max=bound).sum(), student, retain_graph=True)
    (unbounded,) = torch.autograd.grad(terms.sum(), student)
    arguments = student.detach().log_softmax(-1), teacher.log_softmax(-1)
    for how, right in (("zero", wanted), ("straight_through", unbounded)):
        measure = clipped_divergence_of(name, pointwise_clip=bound, clip_gradient=how)
        values, slopes = measure(*arguments)
        assert torch.equal(values, terms.detach().clamp(max=bound))
        gradient = slopes - arguments[0].exp() * slopes.sum(-1, keepdim=True)
        assert torch.allclose(gradient, right, rtol=0, atol=1e-14)
    counts, _ = num_clipped(*arguments, divergence=measure, bound=bound)
    assert torch.equal(counts.sum(-1), (terms > bound).sum(-1).double())
    assert 0 < int(counts.sum()) < counts.numel() and not torch.allclose(wanted, unbounded)


def test_a_bounded_entry_is_pushed_down_although_the_teacher_wants_it_up() -> None:
    """The fault of OPSD's clip, measured: forward KL, πT = (.9, .1), πS = (.1, .9)."""
    student, teacher = (
        torch.tensor(p, dtype=torch.float64).log() for p in ([0.1, 0.9], [0.9, 0.1])
    )
    for bound, is_pushed_up in ((None, True), (0.05, False)):
        _, slopes = clipped_divergence_of("forward_kl", pointwise_clip=bound)(student, teacher)
        gradient = slopes - student.exp() * slopes.sum()
        assert (float(gradient[0]) < 0) is is_pushed_up


# --- the losses -----------------------------------------------------------------------------------

MASK = torch.tensor([[True, True, True], [True, False, False]])


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_gkd_is_the_divergence_of_the_trained_tokens(bad: float) -> None:
    values = torch.tensor([[0.5, bad, 0.25], [2.0, bad, 7.0]], requires_grad=True)
    loss, stats = gkd_loss(divergence_to_teacher=values, mask=MASK)
    assert loss.tolist() == [[0.5, 0, 0.25], [2.0, 0, 0]]
    assert stats["dropped"].tolist() == [[False, True, False], [False, False, False]]
    loss.sum().backward()
    assert values.grad is not None and values.grad.tolist() == [[1, 0, 1], [1, 0, 0]]


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_sft_is_the_negative_log_prob_of_the_trained_tokens(bad: float) -> None:
    logprobs = torch.tensor([[-0.5, bad, -0.25], [-2.0, bad, -7.0]], requires_grad=True)
    loss, stats = sft_loss(student_logprobs=logprobs, mask=MASK)
    assert loss.tolist() == [[0.5, 0, 0.25], [2.0, 0, 0]]
    assert stats["dropped"].tolist() == [[False, True, False], [False, False, False]]
    loss.sum().backward()
    assert logprobs.grad is not None and logprobs.grad.tolist() == [[-1, 0, -1], [-1, 0, 0]]
