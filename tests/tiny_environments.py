"""Environments whose turns any model can take, however it writes."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from rlad.tasks import Problem, Split, split_of
from rlad.tasks.base import Judgement, judged
from rlad.tasks.episodes import Environment, EpisodeFailed, EpisodeRules, Step, checked_step


class Adding(Environment):
    """Asks for sums of single digits as those of `tiny_runs`, `num_rounds` of them; each is worth
    an equal share of 1 where the turn's last digit is right."""

    def __init__(self, num_rounds: int = 3) -> None:
        self.num_rounds = num_rounds

    @staticmethod
    def problem(number: int) -> Problem:
        return Problem("", "", str(number), metadata={"number": number % 1000})

    def reset(self, problem: Problem, *, seed: int) -> str:
        self.number = problem.metadata["number"]
        self.round = 0
        return self.question()

    def question(self) -> str:
        a, b = divmod((self.number + 5 * self.round) % 9, 3)
        self.answer = str((a + b) % 3)
        return f"{a} + {b} ="

    def step(self, text: str) -> Step:
        reward = float(text.split()[-1:] == [self.answer]) / self.num_rounds
        self.round += 1
        done = self.round == self.num_rounds
        return Step("" if done else self.question(), reward, done)


class AddingInConversation(Adding):
    """Has a system message before each sum."""

    @staticmethod
    def problem(number: int) -> Problem:
        problem = Adding.problem(number)
        text = Adding().reset(problem, seed=0)
        return replace(problem, messages=(("system", "Be brief."), ("user", text)))


class Faulty:
    """Does at its second step what its option `fault` says."""

    def __init__(self, fault: str) -> None:
        self.fault = fault

    def reset(self, problem: Problem, *, seed: int) -> str:
        if self.fault == "reset":
            raise RuntimeError("no board")
        self.num_steps = 0
        return "1 + 1 ="

    def step(self, text: str) -> Any:
        self.num_steps += 1
        if self.num_steps < 2:
            return "1 =", 0.0, False, {}
        if self.fault == "raises":
            raise RuntimeError("the door is locked")
        if self.fault == "hangs":
            time.sleep(3600)
        return {
            "nan": ("", float("nan"), True, {}),
            "types": [1, 2],
            "text": (None, 1.0, True, {}),
            "huge": ("1 " * 10**6, 0.0, False, {}),
            "endless": ("1 =", 0.0, False, {}),
        }[self.fault]


class Guarded(Environment):
    """A `Faulty` one whose faults cost an episode, as those of a process of its own do."""

    def __init__(self, fault: str) -> None:
        self.inner = Faulty(fault)

    def reset(self, problem: Problem, *, seed: int) -> str:
        return self.inner.reset(problem, seed=seed)

    def step(self, text: str) -> Step:
        try:
            return checked_step(self.inner.step(text))
        except RuntimeError as error:
            raise EpisodeFailed(str(error)) from None


def train_numbers(num: int) -> list[int]:
    """The first numbers whose problems are in the training split."""
    return [n for n in range(10 * num) if split_of(str(n)) == "train"][:num]


class InThisProcess:
    """A task of one of these environments without a process of its own; its verdicts are those of
    `rules`."""

    def __init__(self, make: Callable[[], Environment], **rules: Any) -> None:
        self.name = "tiny"
        self.reward_range = (float("-inf"), float("inf"))
        self.episode_rules = EpisodeRules(make, **rules)

    def problem(self, split: Split, index: int, *, seed: int = 0) -> Problem:
        problem = replace(Adding.problem(100 * seed + index), key=f"{split} {seed} {index}")
        return replace(problem, prompt=self.episode_rules.make().reset(problem, seed=0))

    def num_problems(self, split: Split) -> int | None:
        return None

    def judge(self, problem: Problem, completion: str) -> Judgement:
        return judged(False)

    def close(self) -> None:
        pass
