"""Runs some of whose steps are not finite, on either engine. Also a program of its own, where rank
1 alone is poisoned:

torchrun --nproc_per_node 2 tests/poisoned.py RUN.toml STEP...
"""

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import rlad.training.run
from rlad.config.file import load_config
from rlad.teachers.base import SynchronousTeacher, Teacher


class Poisoned(SynchronousTeacher):
    """Gives log-probs of -3e38, whose sum is infinite in float32, in the rollout batches before
    some optimiser steps."""

    def __init__(self, teacher: Teacher, engine: Any, steps: Sequence[int]):
        self.teacher, self.engine, self.steps = teacher, engine, steps
        self.identity = teacher.identity

    def logprobs(self, requests: Any) -> list[Tensor]:
        answers = self.teacher.logprobs(requests)
        return (
            [torch.full_like(row, -3e38) for row in answers]
            if self.engine.step + 1 in self.steps
            else answers
        )


def poison_engines(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    make_engine = rlad.training.run.make_engine

    def of(*steps: int) -> None:
        def make(*args: Any, **kwargs: Any) -> Any:
            engine: Any = make_engine(*args, **kwargs)
            engine.teacher = Poisoned(engine.teacher, engine, steps)
            return engine

        monkeypatch.setattr(rlad.training.run, "make_engine", make)

    return of


if __name__ == "__main__":
    if os.environ["RANK"] == "1":
        poison_engines(pytest.MonkeyPatch())(*map(int, sys.argv[2:]))
    rlad.training.run.train(load_config(sys.argv[1]))
