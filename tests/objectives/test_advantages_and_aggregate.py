"""Group advantages and the one place that divides."""

import math

import pytest
import torch

import reference
from rlad.objectives.advantages import group_advantages
from rlad.objectives.aggregate import aggregate, denominator


def test_advantages_by_hand() -> None:
    """Rewards 1 0 0 0: mean 1/4, population std sqrt(3)/4 = .4330; (1 - .25)/(.4330 + 1e-4) =
    1.73165."""
    rewards = torch.tensor([1.0, 0, 0, 0, 1, 1, 0, 0], dtype=torch.float64)
    std = math.sqrt(3) / 4 + 1e-4
    expected = [
        0.75 / std,
        *[-0.25 / std] * 3,
        0.5 / 0.5001,
        0.5 / 0.5001,
        -0.5 / 0.5001,
        -0.5 / 0.5001,
    ]
    assert group_advantages(rewards, 4).tolist() == pytest.approx(expected, abs=1e-14)
    assert group_advantages(rewards, 4, scale="none").tolist() == pytest.approx(
        [0.75, -0.25, -0.25, -0.25, 0.5, 0.5, -0.5, -0.5]
    )


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -1.7, 1e6])
def test_equal_rewards_give_exactly_zero(value: float) -> None:
    assert (group_advantages(torch.full((9,), value), 3) == 0).all()


def test_rollouts_without_judgement_are_left_out() -> None:
    rewards = torch.tensor([1.0, math.nan, 0.0, 1.0, 0.0, math.nan], dtype=torch.float64)
    advantages = group_advantages(rewards, 3, judged=torch.isfinite(rewards))
    assert advantages.tolist() == pytest.approx(
        [0.5 / 0.5001, 0, -0.5 / 0.5001] * 1 + [0.5 / 0.5001, -0.5 / 0.5001, 0]
    )
    nothing = group_advantages(
        torch.full((2,), math.nan), 2, judged=torch.zeros(2, dtype=torch.bool)
    )
    assert nothing.tolist() == [0, 0]


def test_bad_rewards_are_refused() -> None:
    with pytest.raises(ValueError, match="reward 1 is nan"):
        group_advantages(torch.tensor([0.0, math.nan]), 2)
    with pytest.raises(ValueError, match="group_size is 1"):
        group_advantages(torch.zeros(4), 1)
    with pytest.raises(ValueError, match="group_size is 3 and rewards have shape"):
        group_advantages(torch.zeros(4), 3)


def _batch() -> tuple[torch.Tensor, torch.Tensor, list[list[float]]]:
    loss = torch.arange(1.0, 13.0, dtype=torch.float64).view(3, 4)
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]).bool()
    return loss, mask, [row[keep].tolist() for row, keep in zip(loss, mask, strict=True)]


def test_aggregate_by_hand() -> None:
    """Rows: [1, 2], nothing, [9, 10, 11, 12]."""
    loss, mask, _ = _batch()
    assert aggregate(loss, mask, mode="sequence_mean").item() == (1.5 + 10.5) / 2
    assert aggregate(loss, mask, mode="token_mean").item() == (3 + 42) / 6
    assert aggregate(loss, mask, mode="constant_length", max_completion_tokens=5).item() == (
        3 + 42
    ) / (2 * 5)


def test_aggregate_equals_the_slow_reference() -> None:
    loss, mask, rows = _batch()
    assert aggregate(loss, mask, mode="sequence_mean").item() == pytest.approx(
        reference.sequence_mean(rows)
    )
    assert aggregate(loss, mask, mode="token_mean").item() == pytest.approx(
        reference.token_mean(rows)
    )
    assert aggregate(
        loss, mask, mode="constant_length", max_completion_tokens=7
    ).item() == pytest.approx(reference.constant_length(rows, 7))


@pytest.mark.parametrize("mode", ["sequence_mean", "token_mean", "constant_length"])
def test_split_order_and_padding_change_nothing(mode: str) -> None:
    generator = torch.Generator().manual_seed(1)
    loss = torch.randn(12, 9, generator=generator, dtype=torch.float64)
    mask = torch.rand(12, 9, generator=generator) < 0.6
    settings = {"mode": mode, "max_completion_tokens": 9}
    whole = aggregate(loss, mask, **settings).item()
    total = denominator(mask, **settings)
    for sizes in ([1, 11], [3, 3, 6], [1] * 12):
        parts = zip(loss.split(sizes), mask.split(sizes), strict=True)
        assert sum(
            aggregate(x, m, denominator=total, **settings).item() for x, m in parts
        ) == pytest.approx(whole, abs=1e-13)
    order = torch.randperm(12, generator=generator)
    assert aggregate(loss[order], mask[order], **settings).item() == pytest.approx(whole, abs=1e-13)
    wider = (
        torch.nn.functional.pad(loss, (0, 5), value=math.nan),
        torch.nn.functional.pad(mask, (0, 5), value=False),
    )
    assert aggregate(*wider, **settings).item() == pytest.approx(whole, abs=1e-13)


def test_nothing_to_train_on_is_zero_and_bad_modes_are_refused() -> None:
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    assert aggregate(torch.full((2, 3), math.nan), nothing, mode="sequence_mean").item() == 0
    with pytest.raises(
        ValueError,
        match="'mean' has no denominator; use one of sequence_mean, token_mean, constant_length",
    ):
        aggregate(torch.zeros(2, 3), nothing, mode="mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the last with max_completion_tokens"):
        aggregate(torch.zeros(2, 3), nothing, mode="constant_length")
