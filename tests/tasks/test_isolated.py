"""Environments that do what none should: each costs one rollout, and the others continue."""

import os
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest

from rlad.errors import UserError
from rlad.tasks import make_task
from rlad.tasks.base import Problem, Verdict
from rlad.tasks.episodes import EpisodeFailed, EpisodeRules


def locked() -> None:
    raise RuntimeError("the door is locked")


FAULTY_STEPS: dict[str, Callable[[], Any]] = {
    "raise": locked,
    "exit": sys.exit,
    "die": lambda: os._exit(3),
    "hang": lambda: time.sleep(3600),
    "eat": lambda: ("x" * 2**31, 0.0, False, {}),
    "huge": lambda: ("1 " * 10**6, 0.0, False, {}),
    "nan": lambda: ("", float("nan"), True, {}),
    "types": lambda: ["", 1.0, True],
    "none": lambda: None,
    "info": lambda: ("", 1.0, True, {"success": True, "handle": lambda: None, "feedback": 7}),
}


class Counting:
    """Counts its steps, unless the model writes what to do instead."""

    def __init__(self, is_forgetful: bool = False) -> None:
        self.is_forgetful = is_forgetful

    def reset(self, problem: Problem, *, seed: int) -> str:
        self.num_steps = 0
        self.base = os.getpid() if self.is_forgetful else seed
        return "0"

    def step(self, text: str) -> Any:
        if text in FAULTY_STEPS:
            return FAULTY_STEPS[text]()
        self.num_steps += 1
        return f"{self.base + self.num_steps}", 0.0, False, {}

    def close(self) -> None:
        raise RuntimeError("closed twice")


class Unready:
    """Cannot begin."""

    def reset(self, problem: Problem, *, seed: int) -> str:
        raise RuntimeError("no board")

    def step(self, text: str) -> Any:
        return "", 0.0, True, {}


@pytest.fixture
def task(request):
    options = getattr(request, "param", {})
    made = make_task(
        "environment",
        path="test_isolated:Counting",
        options=options,
        timeout_seconds=1.0,
        max_memory_gib=0.5,
    )
    yield made
    made.close()


FAULTS = {
    "raise": "RuntimeError: the door is locked",
    "exit": "SystemExit",
    "die": "the process died with exit code 3",
    "hang": "no result within 1 seconds",
    "eat": "it needs more than 0.5 GiB of memory",
    "huge": "the environment's text has 2000000 characters, more than 100000",
    "nan": "the environment returned nan for a reward",
    "types": "the environment returned .*, not .text, reward, done, info.",
    "none": "the environment returned None, not",
}


def test_each_fault_costs_its_own_episode_and_the_others_continue(task):
    rules: EpisodeRules = task.episode_rules
    problem = task.problem("train", 0)
    other = rules.make()
    assert other.reset(problem, seed=10) == problem.prompt == "0"
    for number, (fault, reason) in enumerate(FAULTS.items(), 1):
        faulty = rules.make()
        faulty.reset(problem, seed=20)
        assert faulty.step("go").text == "21"
        with pytest.raises(EpisodeFailed, match=reason):
            faulty.step(fault)
        faulty.close()
        assert other.step("go").text == str(10 + number)
    last = rules.make()
    last.reset(problem, seed=0)
    step = last.step("info")
    assert (step.reward, step.info) == (1.0, {"success": True, "feedback": "7"})


@pytest.mark.parametrize("task", [{"is_forgetful": True}], indirect=True)
def test_an_episode_that_does_not_repeat_itself_is_lost_with_the_process(task):
    problem = task.problem("train", 0)
    one, other = task.episode_rules.make(), task.episode_rules.make()
    for environment in (one, other):
        environment.reset(problem, seed=0)
        environment.step("go")
    with pytest.raises(EpisodeFailed, match="died"):
        one.step("die")
    with pytest.raises(EpisodeFailed, match="does not repeat what it did"):
        other.step("go")
    fresh = task.episode_rules.make()
    assert fresh.reset(problem, seed=0) == "0" and fresh.step("go").text


def test_a_fault_cannot_be_judged_and_a_class_that_cannot_begin_is_refused(task):
    judgement = task.judge(task.problem("train", 0), "raise")
    assert judgement.verdict is Verdict.CANNOT_JUDGE and "door" in judgement.reason
    unready = make_task("environment", path="test_isolated:Unready")
    with pytest.raises(UserError, match=r"cannot be reset for problem .*no board"):
        unready.problem("train", 0)
    unready.close()
