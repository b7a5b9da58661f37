"""Environments whose turns any model can take, however it writes."""

import time
from typing import Any

from rlad.tasks import Problem, split_of
from rlad.tasks.episodes import Environment, Step


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


def train_numbers(num: int) -> list[int]:
    """The first numbers whose problems are in the training split."""
    return [n for n in range(10 * num) if split_of(str(n)) == "train"][:num]
