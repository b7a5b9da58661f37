"""What an update did with each token: every fate by hand, and the same story as the metrics of the
step."""

import math

import pytest
import torch

from parity_cases import make_case, rollouts_of
from rlad.engines.imitation import FATES, ImitationMap, imitation_of
from rlad.engines.metrics import TokenStats
from rlad.objectives import token_loss
from rlad.objectives.inputs import LossInputs

NAN = math.nan


def inputs(
    student: list[list[float]], teacher: list[list[float]], advantages: list[float]
) -> LossInputs:
    """Before any step: the old policy is the student. NaN in the student's row is padding."""
    logprobs = torch.tensor(student, dtype=torch.float64)
    return LossInputs(
        student_logprobs=logprobs,
        old_logprobs=logprobs,
        teacher_logprobs=torch.tensor(teacher, dtype=torch.float64),
        advantages=torch.tensor(advantages, dtype=torch.float64),
        mask=~logprobs.isnan(),
    )


def test_every_fate_by_hand() -> None:
    """alpha .5, c 1, so log r = .5 clamp(log πS - log πT); gated above log 1.28 = .247 and below
    log .8 = -.223.

    Right answer: .4 reinforced; .8 and 3 (clamped) held back; -.6 reinforced; no teacher value.
    Wrong: .8 punished; -.6 and
    -3 (clamped) protected. The third row has no advantage.
    """
    given = inputs(
        [[-1.0, -1.0, -1.0, -1.0, -1.0], [-1.0, -1.0, -4.0, NAN, NAN], [-1.0, -1.0, NAN, NAN, NAN]],
        [[-1.4, -1.8, -4.0, -0.4, NAN], [-1.8, -0.4, -1.0, NAN, NAN], [-1.8, -0.4, NAN, NAN, NAN]],
        [1.23456, -0.5, 0.0],
    )
    _, stats = token_loss("trrd", given)
    assert imitation_of(given, stats, 0) == {
        "fates": "+hh+.",
        "advantages": [1.235] * 5,
        "clamped": "..c..",
        "log_ratio_to_teacher": [0.4, 0.8, 3.0, -0.6, 0.0],
    }
    assert imitation_of(given, stats, 1) == {
        "fates": "-pp",
        "advantages": [-0.5] * 3,
        "clamped": "..c",
        "log_ratio_to_teacher": [0.8, -0.6, -3.0],
    }
    assert imitation_of(given, stats, 2) == {
        "fates": "..",
        "advantages": [0.0] * 2,
        "clamped": "..",
        "log_ratio_to_teacher": [0.8, -0.6],
    }
    assert set("+hh+.-pp..") == set(FATES) - {"e"}  # which episodes alone have


def test_objectives_without_a_clamp_a_teacher_or_a_surrogate() -> None:
    given = inputs([[-1.0, -2.0]], [[-1.5, -1.0]], [2.0])
    assert imitation_of(given, token_loss("grpo", given)[1], 0) == {
        "fates": "++",
        "advantages": [2.0, 2.0],
    }
    rlsd = imitation_of(given, token_loss("rlsd", given)[1], 0)
    assert rlsd == {"fates": "++", "advantages": [2.0, 2.0], "log_ratio_to_teacher": [0.5, -1.0]}
    assert imitation_of(given, token_loss("opd", given)[1], 0) is None


def test_advantages_per_token() -> None:
    given = inputs([[-1.0, -1.0, -1.0]], [[-1.0, -1.0, -1.0]], [0.0])
    given = LossInputs(
        student_logprobs=given.student_logprobs,
        old_logprobs=given.old_logprobs,
        teacher_logprobs=given.teacher_logprobs,
        advantages=torch.tensor([[0.5, -0.25, 0.0]], dtype=torch.float64),
        mask=given.mask,
    )
    record = imitation_of(given, token_loss("topd", given)[1], 0)
    assert record == {
        "fates": "+-.",
        "advantages": [0.5, -0.25, 0.0],
        "log_ratio_to_teacher": [0.0] * 3,
    }


@pytest.mark.parametrize("tokens_per_batch", [1, 10_000])
def test_the_fates_of_a_step_are_its_gated_shares(tokens_per_batch: int) -> None:
    case = make_case("trrd", optimization={"tokens_per_batch": tokens_per_batch})
    batch = case.engine.make_rollout_batch(0)
    stats = TokenStats()
    group = next(
        g
        for g in range(4)
        if len({float(a) for a in batch.advantages[4 * g : 4 * g + 4]} - {0.0}) > 1
    )
    recorded = ImitationMap(4 * group, 4)
    case.engine.accumulate_gradient(batch, rollouts_of(case, [group]), stats, recorded)
    imitation = recorded.of_rollout
    summary = stats.summary()
    trained = [i for i in range(4) if batch.advantages[4 * group + i] != 0]
    assert sorted(imitation) == trained
    fates = "".join(imitation[i]["fates"] for i in trained)
    clamped = "".join(imitation[i]["clamped"] for i in trained)
    count = {letter: fates.count(letter) for letter in FATES}
    assert len(fates) == summary["objective/trained_tokens/count"]
    assert min(count[letter] for letter in "+h-p") > 0 and count["."] == 0
    assert count["h"] / (count["h"] + count["+"]) == pytest.approx(
        summary["objective/gated_positive/frac"]
    )
    assert count["p"] / (count["p"] + count["-"]) == pytest.approx(
        summary["objective/gated_negative/frac"]
    )
    assert clamped.count("c") / len(clamped) == pytest.approx(summary["objective/clamped/frac"])
    for i in trained:
        record = imitation[i]
        advantage = float(batch.advantages[4 * group + i])
        assert len(record["fates"]) == len(batch.completions[4 * group + i])
        assert record["advantages"] == [pytest.approx(advantage, abs=5e-4)] * len(record["fates"])
        assert set(record["fates"]) <= set("+h" if advantage > 0 else "-p")


def test_it_is_told_of_the_first_group_of_each_step() -> None:
    case = make_case(
        "grpo", optimization={"num_steps": 4, "steps_per_rollout_batch": 2, "learning_rate": 1e-3}
    )
    told = 0
    for result in case.engine.steps():
        assert result.imitation is not None
        rollouts = result.groups[0].rollouts
        rewards = {r.reward for r in rollouts if r.verdict != "cannot_judge"}
        trained = (
            [i for i, r in enumerate(rollouts) if r.verdict != "cannot_judge"]
            if len(rewards) > 1
            else []
        )
        assert sorted(result.imitation) == trained
        for i in trained:
            assert len(result.imitation[i]["fates"]) == len(rollouts[i].completion.token_ids)
        told += len(trained)
    assert told > 0
