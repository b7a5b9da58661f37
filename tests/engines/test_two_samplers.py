"""The two samplers of an objective for which the teacher writes."""

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from copied_samplers import AHEAD, CopySampler
from rlad.config.file import parse_config
from rlad.engines.native import batches, make_engine
from rlad.errors import UserError
from rlad.models.student import load_student
from rlad.tasks import make_task
from tiny_runs import run_config

SFT: dict[str, Any] = {"objective": {"type": "sft"}}


class Sampler(CopySampler):
    """Remembers how it was made, and whether it was closed."""

    def __init__(self, student: Any, rollout: Any):
        super().__init__(student, rollout)
        self.sleep = rollout.vllm.sleep
        self.is_closed = False

    def close(self) -> None:
        self.is_closed = True


def start_and_close(
    world: Path, monkeypatch: pytest.MonkeyPatch, made: list[Sampler], most: int
) -> None:
    def make_sampler(student: Any, rollout: Any, before_work: Any = None) -> Sampler:
        if len(made) == most:
            raise UserError("there is no room for another one.")
        made.append(Sampler(student, rollout))
        return made[-1]

    monkeypatch.setattr(batches, "make_sampler", make_sampler)
    config = parse_config(run_config(world, Path("unused"), rollout={"engine": "vllm"}, **SFT))
    with closing(make_task(**config.task.model_dump())) as task:
        make_engine(config, load_student(config), task, before_work=lambda: None).close()


def test_neither_of_two_sleeps(world, monkeypatch) -> None:
    """vLLM lets one of a process sleep."""
    made: list[Sampler] = []
    start_and_close(world, monkeypatch, made, most=2)
    assert [(one.sleep, one.is_closed) for one in made] == [("never", True)] * 2


def test_the_first_one_is_closed_when_the_second_one_cannot_start(world, monkeypatch) -> None:
    made: list[Sampler] = []
    with pytest.raises(UserError, match="no room"):
        start_and_close(world, monkeypatch, made, most=1)
    assert [one.is_closed for one in made] == [True]


@pytest.mark.parametrize(
    ("rollout", "sentence"),
    [
        (AHEAD, "max_staleness = 1 lets servers sample ahead with the student, but"),
        ({"engine": "vllm", "vllm": {"sleep": "always"}}, "one vLLM of a process can sleep"),
    ],
)
def test_what_does_nothing_where_the_teacher_writes_is_refused(world, rollout, sentence) -> None:
    with pytest.raises(UserError, match=sentence):
        parse_config(run_config(world, Path("unused"), rollout=rollout, **SFT))
