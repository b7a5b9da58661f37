"""The numbers of a step: over all its trained tokens, never an average of averages."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from parity_cases import OBJECTIVES, make_case
from rlad.engines.metrics import TokenStats, ranking_metrics, rollout_metrics
from rlad.objectives.inputs import LossInputs
from rlad.rollouts.types import Completion, Rollout, RolloutGroup
from rlad.tasks import Problem


def inputs(
    advantages: list[float], mask: list[list[bool]], teacher: Tensor | None = None
) -> LossInputs:
    shape = torch.tensor(mask).shape
    return LossInputs(
        student_logprobs=torch.full(shape, -1.0, requires_grad=True),
        old_logprobs=torch.full(shape, -2.0),
        advantages=torch.tensor(advantages),
        mask=torch.tensor(mask),
        teacher_logprobs=teacher,
    )


def test_means_are_over_the_tokens_of_all_micro_batches() -> None:
    """Three tokens, then one: the entropy's mean is (1 + 2 + 3 + 10) / 4, not (2 + 10) / 2."""
    stats = TokenStats()
    first = torch.tensor([[1.0, 2.0], [3.0, 99.0]])
    stats.add(
        inputs([1.0, -1.0], [[True, True], [True, False]]),
        first,
        torch.full((2, 2), -2.25),
        {"ratio": first / 2},
    )
    stats.add(
        inputs([1.0], [[True]]),
        torch.tensor([[10.0]]),
        torch.tensor([[-2.0]]),
        {"ratio": torch.tensor([[1.0]])},
    )
    summary = stats.summary()
    assert summary["student/entropy/mean"] == 4
    assert summary["objective/trained_tokens/count"] == 4
    assert (summary["objective/ratio/mean"], summary["objective/ratio/max"]) == (1.0, 1.5)
    # The sampler is compared with the old policy (-2), not with the student that has moved on (-1).
    assert summary["sampler/mismatch/mean"] == pytest.approx(0.75 / 4)
    assert summary["sampler/mismatch/max"] == 0.25


def test_gated_shares_are_of_the_tokens_of_that_sign() -> None:
    """Advantage > 0: two of three tokens are gated; < 0: one of one; 0: counted by neither."""
    mask = [[True, True, True], [True, False, False], [True, True, True]]
    gated_positive = torch.tensor(
        [[True, True, False], [False, False, False], [False, False, False]]
    )
    gated_negative = torch.tensor(
        [[False, False, False], [True, True, True], [False, False, False]]
    )
    stats = TokenStats()
    columns = {
        "gated_positive": gated_positive,
        "gated_negative": gated_negative,
        "clamped": gated_positive,
    }
    stats.add(inputs([2.0, -1.0, 0.0], mask), torch.zeros(3, 3), torch.zeros(3, 3), columns)
    summary = stats.summary()
    assert summary["objective/gated_positive/frac"] == pytest.approx(2 / 3)
    assert summary["objective/gated_negative/frac"] == 1
    assert summary["objective/clamped/frac"] == pytest.approx(2 / 7)


@pytest.mark.parametrize("num_tokens", [1, 2, 21, 101])
def test_quantiles_are_order_statistics(num_tokens: int) -> None:
    values = torch.arange(num_tokens, dtype=torch.float32)
    shuffled = values[torch.randperm(num_tokens, generator=torch.Generator().manual_seed(0))][None]
    stats = TokenStats()
    zeros = torch.zeros(1, num_tokens)
    stats.add(
        inputs([1.0], [[True] * num_tokens]), zeros, zeros, {"log_ratio_to_teacher": shuffled}
    )
    summary = stats.summary()
    for name, share in (("q05", 0.05), ("q50", 0.5), ("q95", 0.95)):
        assert summary[f"teacher/log_ratio/{name}"] == round(share * (num_tokens - 1))
    assert summary["teacher/log_ratio/mean"] == (num_tokens - 1) / 2


def test_tokens_without_a_teacher_value_are_in_no_figure() -> None:
    stats = TokenStats()
    teacher = torch.tensor([[-1.0, math.nan]])
    stats.add(
        inputs([1.0], [[True, True]], teacher), torch.tensor([[1.0, 5.0]]), torch.zeros(1, 2), {}
    )
    assert stats.summary()["student/entropy/mean"] == 1


def test_a_step_without_any_token() -> None:
    stats = TokenStats()
    assert stats.summary()["objective/trained_tokens/count"] == 0
    stats.add(
        inputs([1.0], [[False]]), torch.zeros(1, 1), torch.zeros(1, 1), {"ratio": torch.ones(1, 1)}
    )
    assert stats.summary()["objective/trained_tokens/count"] == 0


def test_rollout_metrics_by_hand() -> None:
    def rollout(length: int, verdict: str, reward: float, is_truncated: bool = False) -> Rollout:
        return Rollout(
            Completion((5,) * length, (-1.0,) * length, is_truncated), "", verdict, reward
        )

    mixed = (
        rollout(2, "correct", 1.0),
        rollout(4, "wrong", 0.0, True),
        rollout(3, "cannot_judge", math.nan),
    )
    easy = (
        rollout(1, "correct", 1.0),
        rollout(1, "correct", 1.0),
        rollout(1, "cannot_judge", math.nan),
    )
    problem = Problem("", "", key="")
    metrics = rollout_metrics(
        [RolloutGroup(0, problem, (5,), mixed), RolloutGroup(1, problem, (5,), easy)]
    )
    assert metrics == {
        "reward/mean": 0.75,
        "reward/correct/frac": 0.5,
        "reward/cannot_judge/frac": pytest.approx(1 / 3),
        "reward/zero_variance/frac": 0.5,
        "rollout/completion_tokens/mean": 2,
        "rollout/completion_tokens/max": 4,
        "rollout/truncated/frac": pytest.approx(1 / 6),
        "rollout/repeated/frac": 0.5,  # none of the first group; in the second all three are alike
    }


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_metric_of_a_step_is_finite_and_defined_in_the_docs(objective: str) -> None:
    defined = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
    case = make_case(
        objective, optimization={"num_steps": 2, "steps_per_rollout_batch": 2, "kl_coef": 0.1}
    )
    for result in case.engine.steps():
        for key, value in result.metrics.items():
            assert math.isfinite(value), key
            assert f"`{key}`" in defined, key
        assert result.metrics["sampler/mismatch/max"] < 1e-6


def test_a_teacher_ranks_completions() -> None:
    """Means -1, -2 of the first group (correct, wrong), -3, -1.5 of the second; the third could not
    be judged in part, and one completion has a missing token, one was not scored: 1 of 2 pairs
    within a group, and -1 beats both wrong ones, -3 none: 2 of 4."""
    nan = math.nan
    verdicts = [("correct", "wrong"), ("correct", "wrong"), ("cannot_judge", "correct"), ("wrong",)]
    logprobs = [[-1.0], [-1.0, -3.0], [-3.0], [-1.5], [9.0], [-1.0, nan], []]
    groups = [
        RolloutGroup(
            i,
            Problem("", "", str(i)),
            (),
            tuple(Rollout(Completion((), (), False), "", v, float(v == "correct")) for v in row),
        )
        for i, row in enumerate(verdicts)
    ]
    assert ranking_metrics(groups, [torch.tensor(row) for row in logprobs]) == {
        "teacher/ranking/pairwise": 0.5,
        "teacher/ranking/auc": 0.5,
    }
    assert ranking_metrics(groups[3:], [torch.tensor([-1.0])]) == {}
