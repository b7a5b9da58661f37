"""The native engine against two other witnesses of the same mathematics; what may not change a
gradient, and what must."""

import copy
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from parity_cases import (
    OBJECTIVES,
    USE_NO_REWARD,
    Case,
    WordTask,
    by_engine,
    by_reference,
    by_tiny_loop,
    difference,
    expected_advantages,
    make_case,
    rollouts_of,
    token_logprobs,
)
from rlad.engines.metrics import TokenStats
from rlad.engines.native.loop import NativeEngine
from rlad.engines.rollout_batch import RolloutBatch
from rlad.errors import RunFailedError
from rlad.objectives import token_loss
from rlad.objectives.aggregate import aggregate
from rlad.tasks.base import Judgement, Problem, cannot_judge
from rlad.teachers.base import SynchronousTeacher, TeacherRequest

AGGREGATIONS = ["sequence_mean", "token_mean", "constant_length"]
WITH_TEACHER = [name for name in OBJECTIVES if name != "grpo"]
EXACT = 1e-12
FLOAT32 = 5e-6


class WithoutLeavingOut(NativeEngine):
    """Scores and trains on every judged rollout, also where its gradient is known to be zero."""

    def choose_what_trains(self, batch: RolloutBatch) -> None:
        batch.counted = batch.trains = batch.judged


def agree(ours: tuple[float, Any], theirs: tuple[float, Any], bound: float = EXACT) -> bool:
    loss, gradient = difference(ours, theirs)
    print(f"loss {loss:.1e} gradient {gradient:.1e}")
    return loss < bound and gradient < bound


def test_the_batch_of_these_tests_is_a_telling_one() -> None:
    """Unequal lengths, a group without variance, rollouts without a verdict; tokens gated on both
    sides, clamped, and not."""
    case = make_case()
    batch = case.engine.make_rollout_batch(0)
    stats = TokenStats()
    by_engine(case, batch, rollouts_of(case), stats)
    summary = stats.summary()
    assert len({len(completion) for completion in batch.completions}) > 5
    assert len({len(prompt) for prompt in batch.prompts}) > 2
    assert any(rollout.verdict == "cannot_judge" for rollout in batch.rollouts)
    assert 0.2 < summary["objective/scored_completions/frac"] < 0.8
    for key in ("gated_positive", "gated_negative", "clamped"):
        assert 0.05 < summary[f"objective/{key}/frac"] < 0.95


# --- three witnesses ------------------------------------------------------------------------------


@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_engine_equals_the_slow_reference(objective: str, aggregation: str, kl_coef: float) -> None:
    case = make_case(objective, optimization={"aggregation": aggregation, "kl_coef": kl_coef})
    batch = case.engine.make_rollout_batch(0)
    wanted = rollouts_of(case)
    assert agree(by_engine(case, batch, wanted), by_reference(case, batch, wanted))


@pytest.mark.parametrize(
    ("knobs", "objective"),
    [
        ({"alpha": 0.0}, "trrd"),
        ({"alpha": 0.9, "teacher_log_ratio_clip": 0.2}, "trrd"),
        ({"teacher_log_ratio_clip": "off"}, "trrd"),
        ({"clip_low": 0.05, "clip_high": 0.1}, "trrd"),
        ({"kd_estimator": "k3"}, "kdrl"),
        ({"kd_coef": 0.5, "kd_estimator": "exact"}, "kdrl"),
        ({"kd_coef": 0.5, "kd_estimator": "top_k", "top_k": 3}, "kdrl"),
        ({"kd_coef": 0.5, "kd_estimator": "exact", "teacher_on": "wrong"}, "kdrl"),
        ({"kd_coef": {"start": 0.5, "end": 0.1, "change_per_step": -0.1}}, "kdrl"),
        ({"kd_coef": 0.5, "teacher_on": "wrong"}, "kdrl"),
        ({"kd_coef": 0.5, "teacher_on": "failed_groups"}, "kdrl"),
        ({"kd_coef": 0.5, "teacher_on": "positive"}, "kdrl"),
        ({"teacher_on": "positive"}, "trrd"),
        ({"teacher_on": "wrong"}, "trrd"),
        ({"teacher_on": "failed_groups"}, "trrd"),
        ({"teacher_on": "positive"}, "opd"),
        ({"teacher_on": "wrong"}, "opd"),
        ({"teacher_on": "wrong"}, "topd"),
        ({"teacher_weight": 1.0, "weight_clip": 0.9, "teacher_on": "wrong"}, "rlsd"),
        ({"weight_bound": 10.0, "teacher_on": "positive"}, "distilled_rl"),
        ({"teacher_weight": 1.0}, "rlsd"),
        ({"teacher_weight": 1.0, "weight_clip": 0.9}, "rlsd"),
        ({"teacher_weight": {"start": 0.0, "end": 1.0, "change_per_step": 0.3}}, "rlsd"),
        ({"weight_bound": 1.2}, "distilled_rl"),
        ({"clip_low": 0.0, "clip_high": 0.0, "weight_bound": 10.0}, "distilled_rl"),
        ({"alpha": 0.9}, "topd"),
    ],
)
def test_the_knobs_of_the_config_reach_the_formula(knobs: dict[str, Any], objective: str) -> None:
    case = make_case(objective, knobs=knobs)
    batch = case.engine.make_rollout_batch(0)
    wanted = rollouts_of(case)
    case.engine.step = 2
    assert agree(by_engine(case, batch, wanted), by_reference(case, batch, wanted))
    default = make_case(objective)
    assert not agree(
        by_engine(case, batch, wanted),
        by_engine(default, default.engine.make_rollout_batch(0), wanted),
        1e-2,
    )


@pytest.mark.parametrize("objective", ["trrd", "rlsd", "distilled_rl"])
def test_advantages_that_are_not_divided_by_the_standard_deviation(objective: str) -> None:
    case = make_case(objective, optimization={"advantage_scale": "none"})
    batch = case.engine.make_rollout_batch(0)
    wanted = rollouts_of(case)
    assert agree(by_engine(case, batch, wanted), by_reference(case, batch, wanted))
    assert float(batch.advantages.abs().max()) < 1


@pytest.mark.parametrize("alpha", [0.5, 1.0])
@pytest.mark.parametrize(
    ("family", "dtype", "bound"),
    [("gpt2", torch.float64, EXACT), ("llama", torch.float32, FLOAT32)],
)
def test_engine_equals_the_tiny_loop(
    family: str, dtype: torch.dtype, bound: float, alpha: float
) -> None:
    case = make_case(
        knobs={"alpha": alpha}, family=family, dtype=dtype, task=WordTask(is_judged_in_full=True)
    )
    batch = case.engine.make_rollout_batch(0)
    wanted = rollouts_of(case)
    assert agree(
        by_engine(case, batch, wanted), by_tiny_loop(case, batch, wanted, alpha=alpha), bound
    )


def test_alpha_one_is_the_grpo_run() -> None:
    trrd = make_case("trrd", knobs={"alpha": 1.0})
    grpo = make_case("grpo")
    results = [
        by_engine(case, case.engine.make_rollout_batch(0), rollouts_of(case))
        for case in (trrd, grpo)
    ]
    assert agree(*results)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_float32_stays_close_to_the_float64_reference(objective: str) -> None:
    case = make_case(objective, family="llama", dtype=torch.float32)
    batch = case.engine.make_rollout_batch(0)
    wanted = rollouts_of(case)
    assert agree(by_engine(case, batch, wanted), by_reference(case, batch, wanted), FLOAT32)


# --- what may not change the gradient -------------------------------------------------------------


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_micro_batches_do_not_matter(objective: str, aggregation: str) -> None:
    results = []
    for tokens_per_batch in (1, 30, 10_000):
        case = make_case(
            objective,
            optimization={"aggregation": aggregation, "tokens_per_batch": tokens_per_batch},
        )
        batch = case.engine.make_rollout_batch(0)
        results.append(by_engine(case, batch, rollouts_of(case)))
    assert agree(results[0], results[2])
    assert agree(results[1], results[2])


@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean"])
def test_the_mean_of_micro_batch_means_would_be_noticed(aggregation: Any) -> None:
    """With unequal lengths the mistake moves the loss by far more than the bound of these tests."""
    case = make_case("opd", optimization={"aggregation": aggregation})
    batch = case.engine.make_rollout_batch(0)
    wanted = rollouts_of(case)
    right, _ = by_engine(case, batch, wanted)
    prompts = batch.prompts
    completions = batch.completions
    rows = batch.training_rows
    means = []
    for micro in case.engine.scorer.batches(
        [prompts[i] for i in rows], [completions[i] for i in rows]
    ):
        part = [rows[i] for i in micro]
        scores = case.engine.scorer([prompts[i] for i in part], [completions[i] for i in part])
        inputs = batch.loss_inputs(part, scores)
        means.append(
            float(
                aggregate(token_loss("opd", inputs)[0], inputs.trained, mode=aggregation).detach()
            )
        )
    assert len(means) > 1
    assert abs(sum(means) / len(means) / right - 1) > 0.01


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("objective", ["trrd", "grpo", "rlsd", "distilled_rl"])
def test_rollouts_of_advantage_zero_are_left_out_exactly(objective: str, aggregation: str) -> None:
    results = []
    scored = []
    for engine_type in (NativeEngine, WithoutLeavingOut):
        case = make_case(
            objective, optimization={"aggregation": aggregation}, engine_type=engine_type
        )
        batch = case.engine.make_rollout_batch(0)
        stats = TokenStats()
        results.append(by_engine(case, batch, rollouts_of(case), stats))
        scored.append(stats.scored_share)
    assert agree(*results)
    assert scored[0] < scored[1]


@pytest.mark.parametrize("objective", ["trrd", "kdrl"])
def test_gradient_checkpointing_does_not_matter(objective: str) -> None:
    results = []
    for checkpointing in (False, True):
        case = make_case(objective, student={"gradient_checkpointing": checkpointing})
        results.append(by_engine(case, case.engine.make_rollout_batch(0), rollouts_of(case)))
        assert not case.engine.student.model.training
    assert agree(*results)


def test_a_gradient_does_not_remember_the_one_before() -> None:
    case = make_case()
    batch = case.engine.make_rollout_batch(0)
    wanted = rollouts_of(case)
    first = by_engine(case, batch, wanted)
    assert agree(by_engine(case, batch, wanted), first)


# --- temperature, missing values, several steps ---------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_one_temperature_for_student_old_policy_teacher_and_reference(objective: str) -> None:
    case = make_case(objective, rollout={"temperature": 0.7}, optimization={"kl_coef": 0.3})
    batch = case.engine.make_rollout_batch(0)
    wanted = rollouts_of(case)
    ours = by_engine(case, batch, wanted)
    assert agree(ours, by_reference(case, batch, wanted))
    if objective != "grpo":
        assert not agree(ours, by_reference(case, batch, wanted, teacher_temperature=1.0), 0.01)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("objective", WITH_TEACHER)
def test_a_missing_teacher_value_drops_its_token_and_nothing_else(
    objective: str, aggregation: str
) -> None:
    case = make_case(
        objective, optimization={"aggregation": aggregation, "max_missing_teacher_share": 0.9}
    )
    batch = case.engine.make_rollout_batch(0)
    wanted = rollouts_of(case)
    stats = TokenStats()
    assert batch.teacher_logprobs is not None
    whole = by_engine(case, batch, wanted)
    scored = [i for i, values in enumerate(batch.teacher_logprobs) if len(values)]
    # One token of several rollouts, and all tokens of one: that rollout leaves the denominator of
    # the sequence mean.
    dropped = {(i, len(batch.completions[i]) // 2) for i in scored[::2]}
    dropped |= {(scored[1], t) for t in range(len(batch.completions[scored[1]]))}

    class Spotty(SynchronousTeacher):
        identity = "spotty"
        teacher = case.engine.teacher

        def logprobs(self, requests: Sequence[TeacherRequest]) -> list[Tensor]:
            assert self.teacher is not None
            values = self.teacher.logprobs(requests)
            for i, t in dropped:
                values[scored.index(i)][t] = math.nan if i % 2 else -math.inf
            return values

    case.engine.teacher = Spotty()
    batch = case.engine.make_rollout_batch(0)
    ours = by_engine(case, batch, wanted, stats)
    assert agree(ours, by_reference(case, batch, wanted, dropped=dropped))
    assert not agree(ours, whole, 1e-3)
    assert stats.summary()["objective/dropped_tokens/count"] == len(dropped)


class Forgetful(SynchronousTeacher):
    """Leaves out the last `missing` tokens of every second completion in its first `bad_calls`
    answers."""

    identity = "forgetful"

    def __init__(self, missing: int, bad_calls: int):
        self.missing = missing
        self.bad_calls = bad_calls
        self.asked = []

    def logprobs(self, requests: Sequence[TeacherRequest]) -> list[Tensor]:
        self.asked.append(len(requests))
        answers = [torch.full((len(request.completion),), -1.0) for request in requests]
        if len(self.asked) <= self.bad_calls:
            for answer in answers[::2]:
                answer[-self.missing :] = math.nan
        return answers


def test_a_teacher_that_leaves_out_too_much_is_asked_again_for_that_and_then_stops_the_run() -> (
    None
):
    case = make_case()
    case.engine.teacher = teacher = Forgetful(missing=3, bad_calls=1)
    batch = case.engine.make_rollout_batch(0)
    num_asked = len(batch.training_rows)
    assert teacher.asked == [num_asked, -(-num_asked // 2)]
    assert batch.teacher_logprobs is not None and all(
        values.isfinite().all() for values in batch.teacher_logprobs
    )
    case = make_case(optimization={"max_missing_teacher_share": 0.01})
    case.engine.teacher = Forgetful(missing=3, bad_calls=2)
    with pytest.raises(
        RunFailedError,
        match=r"no finite log-prob for \d+\.\d% of the tokens, also when asked again",
    ):
        case.engine.make_rollout_batch(0)


def test_a_second_answer_fills_up_the_first() -> None:
    class Halves(SynchronousTeacher):
        """First it knows the even tokens alone, then the odd ones."""

        identity = "halves"
        calls = 0

        def logprobs(self, requests: Sequence[TeacherRequest]) -> list[Tensor]:
            answers = [
                torch.full((len(request.completion),), -1.0 - self.calls) for request in requests
            ]
            for answer in answers:
                answer[1 - self.calls :: 2] = math.nan
            self.calls += 1
            return answers

    case = make_case(optimization={"max_missing_teacher_share": 0.0})
    case.engine.teacher = Halves()
    batch = case.engine.make_rollout_batch(0)
    assert batch.teacher_logprobs is not None
    for values in filter(len, batch.teacher_logprobs):
        assert values.tolist() == [-1.0 - i % 2 for i in range(len(values))]


def test_a_few_missing_teacher_values_are_dropped_without_a_second_question() -> None:
    case = make_case(optimization={"max_missing_teacher_share": 0.9})
    case.engine.teacher = teacher = Forgetful(missing=1, bad_calls=1)
    case.engine.make_rollout_batch(0)
    assert len(teacher.asked) == 1


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_second_step_on_the_same_rollouts(objective: str) -> None:
    """The old policy is the one that sampled: its log-probs were scored before the first step moved
    the student."""
    case = make_case(objective, optimization={"steps_per_rollout_batch": 2})
    batch = case.engine.make_rollout_batch(0)
    first, second = (case.engine.minibatch(0, part) for part in (0, 1))
    assert sorted(first + second) == [0, 1, 2, 3]
    assert agree(
        by_engine(case, batch, rollouts_of(case, first)),
        by_reference(case, batch, rollouts_of(case, first)),
    )
    case.engine.update(batch, first)
    wanted = rollouts_of(case, [0, *second])
    ours = by_engine(case, batch, wanted)
    assert agree(ours, by_reference(case, batch, wanted))
    batch.old_logprobs = None  # would take the student as it is now for the one that sampled
    assert not agree(ours, by_engine(case, batch, wanted), 1e-3)


def test_old_logprobs_are_those_of_the_sampler() -> None:
    case = make_case(optimization={"steps_per_rollout_batch": 2})
    batch = case.engine.make_rollout_batch(0)
    assert batch.old_logprobs is not None
    for i in batch.training_rows:
        sampled = torch.tensor(batch.rollouts[i].completion.logprobs, dtype=torch.float64)
        assert torch.allclose(batch.old_logprobs[i], sampled, rtol=0, atol=1e-6)


# --- steps ----------------------------------------------------------------------------------------


def weights(case: Case) -> Tensor:
    return torch.cat([p.detach().flatten() for p in case.engine.student.model.parameters()]).clone()


def test_a_step_is_adamw_on_the_clipped_gradient() -> None:
    optimization = {"weight_decay": 0.1, "max_grad_norm": 0.01, "learning_rate": 0.01}
    case = make_case(optimization=optimization)
    batch = case.engine.make_rollout_batch(0)
    wanted = rollouts_of(case)
    _, gradients = by_reference(case, batch, wanted)
    before = {name: p.detach().clone() for name, p in case.engine.student.model.named_parameters()}
    norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
    metrics = case.engine.update(batch, range(4))
    assert metrics["optimization/gradient_norm"] == pytest.approx(norm, rel=1e-9)
    for name, parameter in case.engine.student.model.named_parameters():
        # The first step of Adam: both moments are corrected to the gradient itself.
        g = gradients[name] * 0.01 / (norm + 1e-6)
        expected = before[name] * (1 - 0.01 * 0.1) - 0.01 * g / (g.abs() + 1e-8)
        assert torch.allclose(parameter, expected, rtol=0, atol=1e-9), name


def test_a_batch_without_any_variance_moves_by_momentum_alone() -> None:
    """The same step as without leaving rollouts out: the gradient is zero, not absent."""
    moved = []
    for engine_type in (NativeEngine, WithoutLeavingOut):
        case = make_case(engine_type=engine_type)
        batch = case.engine.make_rollout_batch(0)
        case.engine.update(batch, range(4))
        batch = case.engine.make_rollout_batch(1)
        batch.advantages = torch.zeros_like(batch.advantages)
        case.engine.choose_what_trains(batch)
        before = weights(case)
        metrics = case.engine.update(batch, range(4))
        assert (metrics["optimization/loss"], metrics["optimization/gradient_norm"]) == (0, 0)
        assert metrics["objective/trained_tokens/count"] == (
            0 if engine_type is NativeEngine else sum(map(len, judged(batch)))
        )
        assert all(math.isfinite(value) for value in metrics.values())
        moved.append(weights(case) - before)
    assert float(moved[0].norm()) > 0
    # Where the first gradient is zero but for rounding (1e-17: the biases of keys), Adam divides it
    # by 1e-8: 1e-11 after lr.
    assert torch.allclose(moved[0], moved[1], rtol=0, atol=1e-11)


def judged(batch: RolloutBatch) -> list[tuple[int, ...]]:
    return [r.completion.token_ids for r in batch.rollouts if r.verdict != "cannot_judge"]


def test_nothing_judged_changes_nothing_unless_the_objective_needs_no_reward() -> None:
    class Silent(WordTask):
        def judge(self, problem: Problem, completion: str) -> Judgement:
            return cannot_judge("for the test")

    for objective in OBJECTIVES:
        case = make_case(objective, task=Silent())
        before = weights(case)
        metrics = case.engine.update(case.engine.make_rollout_batch(0), range(4))
        assert metrics["reward/cannot_judge/frac"] == 1
        assert "reward/mean" not in metrics
        assert torch.equal(weights(case), before) == (objective not in USE_NO_REWARD)


def test_a_loss_that_is_not_finite_leaves_the_weights_alone() -> None:
    case = make_case("opd")
    batch = case.engine.make_rollout_batch(0)
    assert batch.teacher_logprobs is not None
    batch.teacher_logprobs[0][:] = -1e308
    batch.teacher_logprobs[1][:] = -1e308
    before = weights(case)
    assert case.engine.update(batch, range(4))["optimization/skipped/count"] == 1
    assert torch.equal(weights(case), before)


def test_a_broken_student_is_reported_as_such() -> None:
    case = make_case()
    batch = case.engine.make_rollout_batch(0)
    with torch.no_grad():
        next(case.engine.student.model.parameters()).fill_(math.nan)
    with pytest.raises(RunFailedError, match="the student's own log-probs are not finite"):
        case.engine.update(batch, range(4))


def test_a_teacher_that_answers_too_little_is_refused() -> None:
    """Filled up with zeros, the missing values would say that the teacher is certain of those
    tokens."""

    class Short(SynchronousTeacher):
        identity = "short"

        def logprobs(self, requests: Sequence[TeacherRequest]) -> list[Tensor]:
            return [torch.zeros(len(request.completion) - 1) for request in requests]

    case = make_case()
    case.engine.teacher = Short()
    with pytest.raises(AssertionError, match="a score for each token"):
        case.engine.make_rollout_batch(0)


# --- the whole loop -------------------------------------------------------------------------------


def test_the_steps_of_a_run() -> None:
    case = make_case(optimization={"num_steps": 5, "steps_per_rollout_batch": 2})
    results = list(case.engine.steps())
    assert [result.step for result in results] == [1, 2, 3, 4, 5]
    seen = [group.problem_index for result in results for group in result.groups]
    assert sorted(seen[:8]) == list(range(8))
    assert len(seen) == 10
    assert [("time/generation/seconds" in result.metrics) for result in results] == [
        True,
        False,
        True,
        False,
        True,
    ]
    assert case.engine.pending is not None


def test_the_advantages_are_those_of_the_judged_rollouts_of_a_group() -> None:
    case = make_case()
    batch = case.engine.make_rollout_batch(0)
    expected = expected_advantages(case, batch)
    assert batch.advantages.tolist() == pytest.approx(expected, abs=1e-12)
    assert len(set(expected)) > 4
    assert all(
        expected[i] == 0 for i, r in enumerate(batch.rollouts) if r.verdict == "cannot_judge"
    )


def test_scores_belong_to_their_rollouts() -> None:
    """Length-sorted micro-batches of the teacher come back to the right rollouts, and left-out ones
    stay empty."""
    case = make_case()
    batch = case.engine.make_rollout_batch(0)
    assert batch.teacher_logprobs is not None
    rows = batch.training_rows
    for i, values in enumerate(batch.teacher_logprobs):
        expected = token_logprobs(
            case.teacher, list(batch.prompts[i]), list(batch.completions[i]), 1.0
        )
        assert (
            torch.allclose(values, torch.stack(expected).detach())
            if i in rows
            else len(values) == 0
        )


def test_the_teacher_is_asked_only_for_what_trains() -> None:
    class Counting(SynchronousTeacher):
        identity = "counting"
        num_asked = 0

        def logprobs(self, requests: Sequence[TeacherRequest]) -> list[Tensor]:
            self.num_asked += len(requests)
            return [torch.zeros(len(request.completion)) for request in requests]

    asked = {}
    runs = [
        ("trrd", {"kl_coef": 0.1}),
        *((name, {}) for name in ("trrd", "rlsd", "distilled_rl", "kdrl", "opd", "topd", "grpo")),
    ]
    for objective, optimization in runs:
        case = make_case(objective, optimization=optimization)
        case.engine.teacher = counting = Counting()
        batch = case.engine.make_rollout_batch(0)
        asked[objective, bool(optimization)] = counting.num_asked
        if counting.num_asked:
            assert batch.teacher_logprobs is not None
            num_tokens = sum(map(len, batch.teacher_logprobs))
            assert batch.counts["teacher/tokens/count"] == num_tokens
    num_judged = len(judged(batch))
    num_unequal = int((batch.advantages != 0).sum())
    assert 0 < num_unequal < num_judged < 16
    assert (
        asked["trrd", False] == asked["rlsd", False] == asked["distilled_rl", False] == num_unequal
    )
    assert asked["trrd", True] == asked["kdrl", False] == num_judged
    assert asked["opd", False] == asked["topd", False] == 16
    assert asked["grpo", False] == 0


# --- opd, then grpo -------------------------------------------------------------------------------

SCHEDULE: dict[str, Any] = {"num_steps": 6, "steps_per_rollout_batch": 2, "learning_rate": 1e-3}


def test_opd_then_grpo_is_opd_then_grpo_with_the_optimiser_carried_over() -> None:
    """4 of 6 steps: the share of .4 is 3 steps, rounded up to the two rollout batches that hold
    them."""
    both = make_case("opd_then_grpo", knobs={"opd_share": 0.4}, optimization=SCHEDULE)
    opd = make_case("opd", optimization=SCHEDULE)
    ours = both.engine.steps()
    theirs = opd.engine.steps()
    for _ in range(4):
        one = next(ours)
        other = next(theirs)
        assert one.metrics["optimization/loss"] == other.metrics["optimization/loss"] != 0
        assert one.imitation == other.imitation
        assert [group.to_json() for group in one.groups] == [
            group.to_json() for group in other.groups
        ]
        assert torch.equal(weights(both), weights(opd))

    # The same state, and a loop that knows GRPO alone.
    grpo = make_case("grpo", optimization=SCHEDULE)
    grpo.engine.student.model.load_state_dict(both.engine.student.model.state_dict())
    grpo.engine.optimizer.load_state_dict(copy.deepcopy(both.engine.optimizer.state_dict()))
    grpo.engine.scheduler.load_state_dict(both.engine.scheduler.state_dict())
    grpo.engine.step = 4
    both.engine.teacher = None
    alone = grpo.engine.steps()
    moments = [state["exp_avg"].clone() for state in grpo.engine.optimizer.state.values()]
    assert sum(float(moment.norm()) for moment in moments) > 0
    trained = 0.0
    for _ in range(2):
        one = next(ours)
        other = next(alone)
        assert one.metrics["optimization/loss"] == other.metrics["optimization/loss"]
        assert (
            one.metrics["objective/trained_tokens/count"]
            == other.metrics["objective/trained_tokens/count"]
        )
        trained += one.metrics["objective/trained_tokens/count"]
        assert (
            "teacher/tokens/count" not in one.metrics
            and "teacher/log_ratio/mean" not in one.metrics
        )
        assert torch.equal(weights(both), weights(grpo))
    assert trained > 0 and next(ours, None) is None


@pytest.mark.parametrize(("index", "objective"), [(0, "opd"), (1, "opd"), (2, "grpo")])
def test_each_phase_of_opd_then_grpo_equals_the_slow_reference(index: int, objective: str) -> None:
    case = make_case(
        "opd_then_grpo", knobs={"clip_low": 0.0, "clip_high": 0.0}, optimization=SCHEDULE
    )
    case.engine.step = 2 * index
    batch = case.engine.make_rollout_batch(index)
    wanted = rollouts_of(case)
    assert agree(
        by_engine(case, batch, wanted), by_reference(case, batch, wanted, objective=objective)
    )
    assert (batch.teacher_logprobs is None) == (objective == "grpo")
    case.engine.update(batch, [0, 1])  # the ratio leaves 1, so the run's own clip is seen
    assert agree(
        by_engine(case, batch, wanted), by_reference(case, batch, wanted, objective=objective)
    )


def test_topd_scores_the_old_policy_before_its_only_step() -> None:
    case = make_case("topd")
    batch = case.engine.make_rollout_batch(0)
    assert batch.old_logprobs is not None and "time/old_logprobs/seconds" in batch.seconds
    for i, values in enumerate(batch.old_logprobs):
        expected = token_logprobs(case.old, list(batch.prompts[i]), list(batch.completions[i]), 1.0)
        assert torch.allclose(values, torch.stack(expected).detach(), rtol=0, atol=1e-12)
    assert make_case("trrd").engine.make_rollout_batch(0).old_logprobs is None
