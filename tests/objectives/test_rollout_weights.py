"""Rollout weights multiply the objective's loss of each token and nothing else."""

import math

import pytest
import torch
from torch import Tensor

from rlad.objectives import OBJECTIVES, token_loss
from rlad.objectives.inputs import LossInputs

NAMES = sorted(
    name
    for name, row in OBJECTIVES.items()
    if name != "sft" and "divergence_to_teacher" not in row.needs
)


def inputs_of(name: str, *, rollout_weights: Tensor | None = None, seed: int = 0) -> LossInputs:
    """A batch with a leash's reference; one token of the second row is not trained."""
    generator = torch.Generator().manual_seed(seed)

    def logprobs() -> Tensor:
        return -torch.rand(4, 5, generator=generator, dtype=torch.float64) * 3

    mask = torch.ones(4, 5, dtype=torch.bool)
    mask[1, 2] = False
    row = OBJECTIVES[name]
    return LossInputs(
        student_logprobs=logprobs().requires_grad_(),
        old_logprobs=logprobs(),
        teacher_logprobs=logprobs() if "teacher_logprobs" in (*row.needs, *row.takes_too) else None,
        reference_logprobs=logprobs(),
        advantages=torch.randn(4, 5, generator=generator, dtype=torch.float64),
        role_evidence=logprobs() if "role_evidence" in row.needs else None,
        mask=mask,
        rollout_weights=rollout_weights,
    )


def loss_and_gradient(name: str, inputs: LossInputs, *, kl_coef: float) -> tuple[Tensor, Tensor]:
    losses, _ = token_loss(name, inputs, kl_coef=kl_coef)
    (gradient,) = torch.autograd.grad(losses.sum(), inputs.student_logprobs)
    return losses.detach(), gradient


def test_by_hand():
    """Student, old policy and teacher agree, so the ratio is 1 and the objective's loss -A = -2;
    the k3 estimate of a reference that is twice as sure is 2 - ln 2 - 1.
    """
    logprobs = torch.tensor([[-1.0, -2.0, -0.5]], dtype=torch.float64)
    inputs = LossInputs(
        student_logprobs=logprobs.clone().requires_grad_(),
        old_logprobs=logprobs,
        teacher_logprobs=logprobs,
        reference_logprobs=logprobs + math.log(2),
        advantages=torch.tensor([2.0], dtype=torch.float64),
        mask=torch.ones(1, 3, dtype=torch.bool),
        rollout_weights=torch.tensor([[0.5, 3.0, 0.0]], dtype=torch.float64),
    )
    losses, gradient = loss_and_gradient("trrd", inputs, kl_coef=0.1)
    leash = 0.1 * (1 - math.log(2))
    assert losses[0].tolist() == pytest.approx([-1 + leash, -6 + leash, leash])
    # d/ds of -w A r is -w A here, and of the leash 0.1 (1 - 2).
    assert gradient[0].tolist() == pytest.approx([-1 - 0.1, -6 - 0.1, -0.1])


@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
@pytest.mark.parametrize("name", NAMES)
def test_a_weight_of_1_is_exactly_no_weight(name, kl_coef):
    ones = torch.ones(4, 5, dtype=torch.float64)
    without = loss_and_gradient(name, inputs_of(name), kl_coef=kl_coef)
    with_ones = loss_and_gradient(name, inputs_of(name, rollout_weights=ones), kl_coef=kl_coef)
    for a, b in zip(with_ones, without, strict=True):
        assert torch.equal(a, b) and b.abs().max() > 1e-2


@pytest.mark.parametrize("name", NAMES)
def test_weights_scale_loss_and_gradient_of_the_objective_and_not_the_leash(name):
    weights = 3 * torch.rand(4, 5, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    plain = loss_and_gradient(name, inputs_of(name), kl_coef=0.0)
    leashed = loss_and_gradient(name, inputs_of(name), kl_coef=0.3)
    both = loss_and_gradient(name, inputs_of(name, rollout_weights=weights), kl_coef=0.3)
    for weighted, objective, whole in zip(both, plain, leashed, strict=True):
        torch.testing.assert_close(
            weighted, weights * objective + (whole - objective), rtol=1e-12, atol=1e-12
        )


def test_weights_of_tokens_that_do_not_train_have_no_influence():
    """Outside the mask, and where the teacher has no value: not even as inf or NaN."""
    weights = torch.full((4, 5), 2.0, dtype=torch.float64)
    inputs = inputs_of("trrd", rollout_weights=weights)
    assert inputs.teacher_logprobs is not None
    inputs.teacher_logprobs[0, 1] = torch.nan
    expected = loss_and_gradient("trrd", inputs, kl_coef=0.3)
    weights[1, 2], weights[0, 1] = torch.nan, torch.inf
    found = loss_and_gradient("trrd", inputs, kl_coef=0.3)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b) and a.isfinite().all() and a[1, 2] == a[0, 1] == 0


def test_refusals():
    with pytest.raises(
        ValueError,
        match=r"rollout_weights has shape \(4, 1\); with a mask \(4, 5\) it must be \(4, 5\)",
    ):
        inputs_of("trrd", rollout_weights=torch.ones(4, 1))
    with pytest.raises(
        ValueError,
        match="rollout_weights carries a gradient; only student_logprobs and "
        "divergence_to_teacher may",
    ):
        inputs_of("trrd", rollout_weights=torch.ones(4, 5, requires_grad=True))
