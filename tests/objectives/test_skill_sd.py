"""`skill_sd`: by hand, its gradient, its bounds. Invariances are in test_objectives.py, the engine
against a slow reference in test_parity.py, the bank in test_skills.py."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rlad.objectives.grpo import grpo_loss
from rlad.objectives.skill_sd import skill_sd_loss


def tensor(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


def term(s: Tensor, o: Tensor, t: Tensor, **knobs: Any) -> Tensor:
    """The distillation term alone: without advantage GRPO has none."""
    mask = torch.ones_like(s, dtype=torch.bool)
    advantages = torch.zeros(len(s), dtype=s.dtype)
    loss, _ = skill_sd_loss(
        student_logprobs=s,
        old_logprobs=o,
        teacher_logprobs=t,
        advantages=advantages,
        mask=mask,
        kd_coef=1.0,
        **knobs,
    )
    return loss


def test_by_hand() -> None:
    """l = -1 + 1.5 = .5, rho = e^.1: 1.10517 * (e^-.5 - 1 + .5) = .11776; its gradient rho l =
    .55259. The second has rho e^1, bounded to 2, and l = -1: 2 (e - 2) = 1.43656, gradient -2. The
    third has l = 7, bounded to 5: e^-5 + 4 = 4.00674, gradient 5."""
    s = tensor(-1.0, -1.0, -1.0).requires_grad_()
    loss = term(s, tensor(-1.1, -2.0, -1.0), tensor(-1.5, 0.0, -8.0))
    wanted = [math.exp(0.1) * (math.exp(-0.5) - 0.5), 2 * (math.e - 2), math.exp(-5) + 4]
    assert loss[0].tolist() == pytest.approx(wanted, abs=1e-14)
    loss.sum().backward()
    assert s.grad is not None
    assert s.grad[0].tolist() == pytest.approx([0.5 * math.exp(0.1), -2.0, 5.0], abs=1e-14)


def test_the_gradient_is_that_of_the_formula_without_bounds() -> None:
    """Autograd through rho (e^-l - 1 + l) as it is written gives rho l."""
    generator = torch.Generator().manual_seed(0)
    s, o, t = (-3 * torch.rand(4, 6, generator=generator, dtype=torch.float64) for _ in range(3))
    s.requires_grad_()
    log_ratio = s - t
    plain = (s - o).exp() * ((-log_ratio).exp() - 1 + log_ratio)
    (wanted,) = torch.autograd.grad(plain.sum(), s)
    ours = term(s, o, t, teacher_log_ratio_clip=None, max_importance_weight=None)
    (found,) = torch.autograd.grad(ours.sum(), s)
    assert torch.allclose(ours, plain, atol=1e-14) and torch.allclose(found, wanted, atol=1e-14)


def test_over_all_tokens_it_is_the_gradient_of_the_reverse_kl() -> None:
    generator = torch.Generator().manual_seed(1)
    logits, others = (torch.randn(8, generator=generator, dtype=torch.float64) for _ in range(2))
    logits.requires_grad_()
    student = logits.log_softmax(0)
    teacher = others.log_softmax(0)
    kl = (student.exp() * (student - teacher)).sum()
    (wanted,) = torch.autograd.grad(kl, logits, retain_graph=True)
    # The expectation over the old policy, which is the student of now.
    probs = student.detach().exp()[None]
    loss = term(student[None], student.detach()[None], teacher[None])
    (found,) = torch.autograd.grad((probs * loss).sum(), logits)
    assert torch.allclose(found, wanted, atol=1e-14)


def test_a_teacher_like_the_student_or_without_weight_leaves_grpo() -> None:
    generator = torch.Generator().manual_seed(2)
    s, o, t = (-3 * torch.rand(4, 6, generator=generator, dtype=torch.float64) for _ in range(3))
    common: dict[str, Any] = {
        "student_logprobs": s.requires_grad_(),
        "old_logprobs": o,
        "advantages": torch.randn(4, generator=generator, dtype=torch.float64),
        "mask": torch.ones(4, 6, dtype=torch.bool),
    }
    (wanted,) = torch.autograd.grad(grpo_loss(**common)[0].sum(), s)
    for teacher, kd_coef in ((s.detach(), 0.5), (t, 0.0)):
        loss, _ = skill_sd_loss(**common, teacher_logprobs=teacher, kd_coef=kd_coef)
        assert torch.equal(torch.autograd.grad(loss.sum(), s)[0], wanted)
    loss, stats = skill_sd_loss(**common, teacher_logprobs=t, kd_coef=0.5)
    assert not torch.allclose(torch.autograd.grad(loss.sum(), s)[0], wanted, atol=1e-2)
    assert not stats["clamped"].any()


@pytest.mark.parametrize("teacher", [-80.0, -math.inf, math.inf, math.nan])
def test_no_log_prob_of_the_teacher_overflows(teacher: float) -> None:
    s = tensor(-1e-3, -2.0).requires_grad_()
    term(s, tensor(-1e-3, -2.0), tensor(teacher, -1.0)).sum().backward()
    assert s.grad is not None and s.grad.isfinite().all()
