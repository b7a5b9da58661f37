"""Where the teacher has a say: what the objective wants, and what the teacher has to say anything
about. Elsewhere a completion trains by its reward alone, or not at all."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rlad
import rlad.training.run
from rlad.config.objective import OBJECTIVE_CONFIGS
from rlad.engines.rollout_batch import RolloutBatch
from rlad.objectives.advantages import group_advantages
from rlad.rollouts.types import Completion, Rollout, RolloutGroup
from rlad.runs.directory import RunDirectory
from rlad.stopping import StopRequested
from rlad.tasks import Problem
from rlad.teachers.base import SynchronousTeacher, TeacherRequest
from tiny_runs import StopAt, remains, run_config

PEERS = {"type": "privileged", "context": {"num_successes": 2, "num_failures": 1}}


# --- which rollouts, by hand ----------------------------------------------------------------------


class SilentOn(SynchronousTeacher):
    """Has nothing to say on some completions, told by their only token."""

    def __init__(self, *tokens: int):
        self.identity = "silent"
        self.tokens = tokens

    def speaks(self, request: TeacherRequest) -> bool:
        return request.completion[0] not in self.tokens

    def logprobs(self, requests: Sequence[TeacherRequest]) -> list[Tensor]:
        assert all(map(self.speaks, requests))
        return [torch.zeros(len(request.completion)) for request in requests]


def batch_of(*rewards: float | None) -> RolloutBatch:
    """Groups of three; the completion of rollout i is the token i; None was not judged."""
    verdicts = {None: "cannot_judge", 1.0: "correct"}
    rollouts = [
        Rollout(
            Completion((i,), (-1.0,), False),
            str(i),
            verdicts.get(reward, "wrong"),
            torch.nan if reward is None else reward,
        )
        for i, reward in enumerate(rewards)
    ]
    groups = [
        RolloutGroup(i, Problem("p", "", str(i)), (0,), tuple(rollouts[i : i + 3]))
        for i in range(0, len(rollouts), 3)
    ]
    values = torch.tensor([torch.nan if r is None else r for r in rewards], dtype=torch.float64)
    judged = torch.tensor([r is not None for r in rewards])
    return RolloutBatch(0, groups, group_advantages(values, 3, scale="std", judged=judged))


#        0    1    2     3    4    5     6    7     8      9    10   11
MIXED = (1.0, 0.0, 0.0, 0.0, 0.5, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0, None)


@pytest.mark.parametrize(
    ("objective", "teacher_on", "asked", "trains"),
    [
        # Groups of one reward have no advantage, so TRRD trains on two groups alone; 4 is its best.
        ("trrd", "all", [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]),
        ("trrd", "positive", [0, 4], [0, 1, 2, 3, 4, 5]),
        ("trrd", "wrong", [1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]),
        ("trrd", "failed_groups", [3, 4, 5], [0, 1, 2, 3, 4, 5]),
        ("kdrl", "all", list(range(11)), list(range(11))),
        ("kdrl", "positive", [0, 4], list(range(11))),
        ("kdrl", "wrong", [1, 2, 3, 4, 5, 9, 10], list(range(11))),
        ("kdrl", "failed_groups", [3, 4, 5, 9, 10], list(range(11))),
        ("opd", "all", list(range(12)), list(range(12))),
        ("opd", "positive", [0, 4], [0, 4]),
        ("opd", "wrong", [1, 2, 3, 4, 5, 9, 10, 11], [1, 2, 3, 4, 5, 9, 10, 11]),
        ("opd", "failed_groups", [3, 4, 5, 9, 10, 11], [3, 4, 5, 9, 10, 11]),
    ],
)
@pytest.mark.parametrize("silent", [(), (4, 1)])
def test_which_rollouts_the_teacher_is_asked_about(
    objective: str, teacher_on: str, asked: list[int], trains: list[int], silent: tuple[int, ...]
) -> None:
    batch = batch_of(*MIXED)
    config: Any = OBJECTIVE_CONFIGS[objective](teacher_on=teacher_on)
    batch.choose_what_trains(config, step=0, has_leash=False, teacher=SilentOn(*silent))
    spoken = [i for i in asked if i not in silent]
    assert batch.teacher_rows == spoken
    assert [request.completion for request in batch.teacher_requests()] == [(i,) for i in spoken]
    if config.trains_without_teacher(0):
        assert batch.training_rows == trains
        assert batch.counted.sum() == 11  # all that were judged
    else:
        assert batch.training_rows == spoken
        assert batch.counted.nonzero().flatten().tolist() == spoken


def test_a_request_has_the_others_of_the_group() -> None:
    batch = batch_of(*MIXED)
    batch.choose_what_trains(OBJECTIVE_CONFIGS["kdrl"](), step=0, has_leash=False)
    request = batch.teacher_requests()[4]
    assert request.rollout is batch.rollouts[4]
    assert list(request.peers) == [batch.rollouts[3], batch.rollouts[5]]


# --- runs -----------------------------------------------------------------------------------------


def with_peers(world: Path, run_dir: Path, objective: dict[str, Any], **shows: Any) -> Any:
    teacher = {**PEERS, "context": PEERS["context"] | shows, "teacher": {"type": "ema"}}
    config = run_config(world, run_dir, rollout={"group_size": 6})
    config["task"]["verifier"] = "user_verifiers:last_digit"
    return config | {"teacher": teacher, "objective": objective}


def metrics_of(config: dict[str, Any]) -> list[dict[str, float]]:
    return list(RunDirectory(rlad.train(config).run_dir).read("metrics.jsonl"))


@pytest.mark.parametrize("objective", ["trrd", "kdrl", "opd", "rlsd", "distilled_rl", "topd"])
def test_a_teacher_with_peers_trains(world: Path, tmp_path: Path, objective: str) -> None:
    rows = metrics_of(with_peers(world, tmp_path / "run", {"type": objective}))
    assert all(row["optimization/skipped/count"] == 0 for row in rows)
    assert any(row["optimization/gradient_norm"] > 0 for row in rows)
    assert any(row.get("teacher/speaks/frac", 1) < 1 for row in rows)
    # A batch without any success asks nobody.
    asked = [row for row in rows if row["teacher/tokens/count"]]
    assert asked and all(1 <= row["teacher/shown_successes/mean"] <= 2 for row in asked)
    assert all(row["teacher/privileged/frac"] == 1 for row in asked)


@pytest.mark.parametrize("objective", ["trrd", "kdrl", "rlsd", "distilled_rl", "opd", "topd"])
def test_a_teacher_that_never_speaks(world: Path, tmp_path: Path, objective: str) -> None:
    """Its prompt of 4 tokens and 8 for the request has no room for a heading: GRPO bit for bit
    (KDRL scores the completions of advantage 0 too, which rounds differently), or no step at all
    where the teacher is all that there is."""
    silent = with_peers(world, tmp_path / "silent", {"type": objective}, max_prompt_tokens=14)
    rows = metrics_of(silent)
    assert all(row["teacher/tokens/count"] == 0 == row["teacher/speaks/frac"] for row in rows)
    if objective in ("opd", "topd"):
        assert all(row["optimization/gradient_norm"] == 0 for row in rows)
        return
    grpo = metrics_of(with_peers(world, tmp_path / "grpo", {"type": "grpo"}))
    for key in ("optimization/loss", "optimization/gradient_norm", "student/entropy/mean"):
        tolerance = {"rel": 1e-4, "abs": 1e-6} if objective == "kdrl" else {"rel": 0, "abs": 0}
        wanted = [row[key] for row in grpo]
        if "student" not in key or objective != "kdrl":
            assert [row[key] for row in rows] == pytest.approx(wanted, **tolerance)


@pytest.mark.parametrize("at", range(8, 90, 16))
def test_a_run_with_peers_resumes_exactly(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """What is shown, drawn and left out follows from what the checkpoint holds, also between the
    steps on one rollout batch."""

    def config(name: str) -> Any:
        objective = {"type": "kdrl", "kd_coef": 0.5, "teacher_on": "wrong"}
        shows = {"choice": "random", "feedback": True, "success_reward": 0.5}
        run = with_peers(world, tmp_path / name / "run", objective, **shows)
        run["optimization"] |= {"steps_per_rollout_batch": 2}
        return run

    def stop_at(safe_point: int) -> None:
        monkeypatch.setattr(rlad.training.run, "Stop", lambda: StopAt(safe_point))

    stop_at(-1)
    rlad.train(config("whole"))
    stop_at(at)
    with pytest.raises(StopRequested):
        rlad.train(config("stopped"))
    stop_at(-1)
    rlad.train(config("stopped"), resume=True)
    assert remains(tmp_path / "stopped" / "run") == remains(tmp_path / "whole" / "run")
