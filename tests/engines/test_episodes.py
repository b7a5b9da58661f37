"""Episodes on the native engine: one turn is the single-turn task bit for bit, and of several only
what the model wrote is trained on."""

import re
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from copied_samplers import CopySampler
from rlad.config.file import parse_config
from rlad.engines.native.loop import NativeEngine
from rlad.models.student import load_student
from rlad.rollouts.grading import graded_groups
from rlad.rollouts.kept_cache import ContinuedSteps, KeptCache
from rlad.rollouts.sampling import OwnSampler
from rlad.tasks import Problem, Split, Task, make_task
from rlad.tasks.base import Verdict
from rlad.tasks.episodes import Environment, EpisodeFailed, EpisodeRules, Step
from rlad.training.run import make_engine
from tiny_environments import Adding, Guarded, InThisProcess
from tiny_runs import OFTEN_CORRECT, objective_section, run_config


class Answering(Environment):
    """Asks a task's question, and judges the only answer."""

    def __init__(self, task: Task):
        self.task = task

    def reset(self, problem: Problem, *, seed: int) -> str:
        self.problem = problem
        return problem.prompt

    def step(self, text: str) -> Step:
        judgement = self.task.judge(self.problem, text)
        if judgement.verdict is Verdict.CANNOT_JUDGE:
            raise EpisodeFailed(judgement.reason)
        return Step("", judgement.reward, done=True, info={"feedback": judgement.feedback})


class InEpisodes:
    """A task's problems as episodes of one turn."""

    def __init__(self, task: Task):
        self.task = task
        self.name = task.name
        self.episode_rules = EpisodeRules(lambda: Answering(task), max_turns=1)

    def problem(self, split: Split, index: int, *, seed: int = 0) -> Problem:
        return self.task.problem(split, index, seed=seed)

    def num_problems(self, split: Split) -> int | None:
        return self.task.num_problems(split)

    def judge(self, problem: Problem, completion: str) -> Any:
        return self.task.judge(problem, completion)

    def close(self) -> None:
        self.task.close()


def weights_after(config: Any, task: Task, num_steps: int = 2) -> dict[str, torch.Tensor]:
    engine = make_engine(config, load_student(config), task, before_work=lambda: None)
    assert isinstance(engine, NativeEngine)
    with closing(engine):
        steps = engine.steps()
        for _ in range(num_steps):
            next(steps)
        return {k: v.clone() for k, v in engine.student.model.state_dict().items()}


@pytest.mark.parametrize("objective", ["trrd", "kdrl", "sdpo", "sft", "topd"])
def test_one_turn_is_the_single_turn_task_bit_for_bit(world: Path, objective: str):
    sections: dict[str, Any] = {"objective": objective_section(objective), "task": OFTEN_CORRECT}
    config = parse_config(run_config(world, Path("unused"), **sections))
    with closing(make_task(**config.task.model_dump())) as task:
        single = weights_after(config, task)
        episodes = weights_after(config, InEpisodes(task))
    start = load_student(config).model.state_dict()
    assert any(not torch.equal(start[name], single[name]) for name in single)
    assert all(torch.equal(single[name], episodes[name]) for name in single)


def config_of(world: Path, **sections: Any) -> Any:
    task = {"type": "environment", "path": "tiny_environments:Adding"}
    return parse_config(run_config(world, Path("unused"), **sections) | {"task": task})


FEW = {"max_turn_tokens": 3}


def batch_of(
    world: Path, index: int = 0, make: Any = Adding, rules: Any = FEW, **sections: Any
) -> Any:
    config = config_of(world, **sections)
    task = InThisProcess(make, **rules)
    engine = make_engine(config, load_student(config), task, before_work=lambda: None)
    assert isinstance(engine, NativeEngine)
    with closing(engine):
        return engine.make_rollout_batch(index), engine


def test_an_episode_is_one_sequence_of_turns_and_replies(world: Path):
    rollout = {"max_completion_tokens": 12}
    batch, engine = batch_of(world, rollout=rollout)
    tokenizer = engine.student.tokenizer
    endings = set()
    for group in batch.groups:
        for one in group.rollouts:
            completion = one.completion
            endings.add(completion.ending)
            assert completion.actions is not None and completion.actions[0]
            assert len(completion.actions) == len(completion.token_ids) == len(completion.logprobs)
            assert completion.num_actions <= 12
            # What the environment wrote is its replies, in their order, but the last one.
            read = [
                t for t, a in zip(completion.token_ids, completion.actions, strict=True) if not a
            ]
            replies = " ".join(turn.reply for turn in one.turns[:-1])
            assert tokenizer.decode(read) == replies
            assert all(
                value == 0.0
                for value, a in zip(completion.logprobs, completion.actions, strict=True)
                if not a
            )
            assert one.reward == pytest.approx(sum(turn.reward for turn in one.turns))
            # An independent game, played again with the same turns.
            game = Adding()
            assert game.reset(group.problem, seed=0) == group.prompt
            assert [game.step(turn.text).text for turn in one.turns] == [
                turn.reply for turn in one.turns
            ]
    assert "done" in endings


def test_log_probs_of_each_turn_are_those_of_the_whole_sequence(world: Path):
    batch, engine = batch_of(world, rollout={"max_completion_tokens": 12})
    scores = engine.scorer.score(*batch.sequences(range(len(batch.rollouts))))
    for values, rollout, actions in zip(scores, batch.rollouts, batch.actions, strict=True):
        sampled = torch.tensor(rollout.completion.logprobs)
        assert (values - sampled)[actions].abs().max() < 1e-4


@pytest.mark.parametrize(
    "objective", ["grpo", "trrd", "kdrl", "opd", "rlsd", "topd", "sdpo", "mopd", "opsd", "gkd"]
)
def test_what_the_environment_wrote_has_no_part_in_loss_and_denominator(
    world: Path, objective: str
):
    sections: dict[str, Any] = {
        "objective": objective_section(objective),
        "optimization": {"aggregation": "token_mean", "learning_rate": 3e-3},
        "rollout": {"max_completion_tokens": 12},
    }
    if objective == "gkd":
        sections["objective"]["support"] = "full"
    batch, engine = batch_of(world, **sections)
    rows = list(range(len(batch.rollouts)))
    kept = batch.counted_tokens(rows)
    for i, tokens in kept.items():
        assert not (tokens & ~batch.actions[i]).any()

    # Log-probs of the environment's tokens reach neither value nor gradient.
    def gradient() -> torch.Tensor:
        from rlad.engines.metrics import TokenStats

        engine.accumulate_gradient(batch, rows, TokenStats())
        return torch.cat([p.grad.flatten().clone() for p in engine.parameters])

    before = gradient()
    for name in ("teacher_logprobs", "old_logprobs"):
        for i, values in enumerate(getattr(batch, name) or ()):
            if len(values):
                values[~batch.actions[i]] = torch.nan
    assert torch.equal(before, gradient())
    assert before.abs().sum() > 0


def groups_of(world: Path, kind: Any, **rollout: Any) -> Any:
    sizes = {"max_completion_tokens": 6, "prompts_per_batch": 6}
    config = config_of(world, rollout=sizes | rollout)
    student = load_student(config)
    return graded_groups(
        student,
        InThisProcess(Adding, **FEW),
        "train",
        range(6),
        rollout=config.rollout,
        seed=3,
        sampler=kind(student, config.rollout),
    )


def test_a_turn_that_reads_what_is_new_alone_is_that_which_reads_all(world: Path, monkeypatch: Any):
    """Tokens, and log-probs but for rounding; only the first turn reads a whole sequence."""
    made: list[int] = []
    init = ContinuedSteps.__init__

    def count(self: Any, model: Any, held: Any, sequences: Any) -> None:
        made.append(len(sequences))
        init(self, model, held, sequences)

    monkeypatch.setattr(ContinuedSteps, "__init__", count)
    kept = groups_of(world, OwnSampler)
    assert sum(made) == sum(len(one.turns) - 1 for group in kept for one in group.rollouts)
    monkeypatch.setattr(KeptCache, "take", lambda self, numbers: None)
    read_anew = groups_of(world, OwnSampler)
    for ours, theirs in zip(kept, read_anew, strict=True):
        for one, other in zip(ours.rollouts, theirs.rollouts, strict=True):
            assert one.completion.token_ids == other.completion.token_ids
            assert one.completion.logprobs == pytest.approx(other.completion.logprobs, abs=1e-5)


def test_a_turn_depends_neither_on_the_batch_nor_on_the_sampler(world: Path):
    """A sampler with a copy of the student, and rows that are decoded two at a time."""
    wanted = groups_of(world, OwnSampler)
    assert {len(one.turns) for group in wanted for one in group.rollouts} == {2, 3}
    for found in (groups_of(world, CopySampler), groups_of(world, OwnSampler, max_batch_rows=2)):
        for ours, theirs in zip(found, wanted, strict=True):
            assert [one.turns for one in ours.rollouts] == [one.turns for one in theirs.rollouts]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("raises", "the door is locked"),
        ("nan", "for a reward"),
        ("types", "not .text, reward, done, info"),
        ("text", "for a text"),
        ("huge", "more than 100000"),
    ],
)
def test_an_environment_that_fails_costs_its_rollouts(world: Path, fault: str, reason: str):
    make = partial(Guarded, fault)
    batch, _ = batch_of(world, make=make, rollout={"max_completion_tokens": 12})
    assert {one.verdict for one in batch.rollouts} == {"cannot_judge"}
    assert {one.completion.ending for one in batch.rollouts} == {"failed"}
    assert all(re.search(reason, one.reason) for one in batch.rollouts)
    assert not batch.trains.any()


def test_an_endless_episode_is_cut_off_and_every_limit_has_its_name(world: Path):
    def endings(max_tokens: int, **rules: Any) -> set[Any]:
        rollout = {"max_completion_tokens": max_tokens}
        make = partial(Guarded, "endless")
        batch, _ = batch_of(world, make=make, rules=rules, rollout=rollout)
        assert all(one.completion.is_truncated for one in batch.rollouts)
        return {one.completion.ending for one in batch.rollouts}

    assert endings(30, max_turns=3, max_turn_tokens=2) == {"turns"}
    assert endings(6, max_turns=100, max_turn_tokens=2) == {"tokens"}
    # The tiny student's context is 256 tokens; two after each turn are the environment's.
    assert endings(200, max_turns=1000, max_turn_tokens=1) == {"context"}


def test_a_batch_of_episodes_and_skills_has_the_metrics_of_the_docs(world: Path):
    config = config_of(world, objective={"type": "skill_sd"}, rollout={"max_completion_tokens": 9})
    config = parse_config(config.model_dump(exclude={"teacher"}))
    task = InThisProcess(Adding, **FEW)
    engine = make_engine(config, load_student(config), task, before_work=lambda: None)
    assert isinstance(engine, NativeEngine)
    with closing(engine):
        first, second = (next(engine.steps()) for _ in range(2))
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    assert [key for key in second.metrics if f"`{key}`" not in page] == []
    wanted = {"rollout/turns/mean", "rollout/ended_by_done/frac", "teacher/skills/count"}
    assert wanted <= second.metrics.keys() and "time/skills/seconds" in second.metrics
    # The first batch has no skill yet, and its teacher is the student: nothing to learn from it.
    assert first.metrics["teacher/privileged/frac"] == 0
    assert abs(first.metrics["teacher/log_ratio/mean"]) < 1e-6
    assert second.metrics["teacher/privileged/frac"] == 1
    assert abs(second.metrics["teacher/log_ratio/mean"]) > 1e-3
    assert first.skills and first.skills["chosen"] == [] and len(first.skills["new"]) == 1
    assert second.skills and second.skills["chosen"][0]["num_chosen"] == 4
