"""Masks that let nothing through."""

import math

import pytest
import torch

from rlad.objectives.masks import clean, keep_finite, masked_mean_of_rows, per_token

NAN, INF = math.nan, math.inf


def test_keep_finite_needs_every_value() -> None:
    mask = torch.tensor([[True, True, True, True, False]])
    first = torch.tensor([[1.0, NAN, 1.0, -INF, 1.0]])
    second = torch.tensor([[1.0, 1.0, INF, 1.0, 1.0]])
    assert keep_finite(mask, first, second).tolist() == [[True, False, False, False, False]]
    assert keep_finite(mask, first).tolist() == [[True, False, True, False, False]]
    assert keep_finite(mask).tolist() == mask.tolist()


def test_clean_before_exp_keeps_nan_out_of_the_gradient() -> None:
    values = torch.tensor([1.0, NAN, INF, -INF, 2000.0], requires_grad=True)
    mask = torch.tensor([True, False, False, False, False])
    clean(values, mask).exp().mul(mask).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [pytest.approx(math.e), 0, 0, 0, 0]


def test_selecting_after_exp_is_the_trap_that_clean_avoids() -> None:
    """`torch.where` on the loss alone: the value is right, the gradient is 0 * inf = NaN."""
    values = torch.tensor([1.0, 2000.0], requires_grad=True)
    loss = torch.where(torch.tensor([True, False]), values.exp(), torch.zeros(())).sum()
    loss.backward()
    assert loss.item() == pytest.approx(math.e)
    assert values.grad is not None
    assert math.isnan(values.grad[1])


def test_per_token_takes_both_shapes() -> None:
    mask = torch.tensor([[True, True], [True, False]])
    assert per_token(torch.tensor([2.0, -1.0]), mask).tolist() == [[2, 2], [-1, 0]]
    assert per_token(torch.tensor([[2.0, 3.0], [-1.0, NAN]]), mask).tolist() == [[2, 3], [-1, 0]]


def test_mean_of_rows_by_hand() -> None:
    values = torch.tensor([[1.0, 3.0, NAN], [5.0, NAN, NAN], [NAN, NAN, NAN]])
    mask = torch.tensor([[True, True, False], [True, False, False], [False, False, False]])
    assert masked_mean_of_rows(values, mask).tolist() == [[2], [5], [0]]
