"""Teachers: what gives one log-prob for each sampled token, and their table. Imports no torch before a teacher is made."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from rlad.config import RunConfig
from rlad.plain_tokenizer import AnyTokenizer
from rlad.tasks import Problem
from rlad.teachers.compatibility import Finding

if TYPE_CHECKING:
    from torch import Tensor

    from rlad.language_model import LanguageModel


@dataclass(frozen=True, slots=True)
class TeacherRequest:
    """A completion that is to be scored, the prompt that it was sampled from, and what a privileged teacher may be shown."""

    prompt: Sequence[int]
    completion: Sequence[int]
    problem: Problem | None = None
    peer_solution: str | None = None
    """a correct completion of the same group, not this one"""


Ask = Callable[[Sequence[TeacherRequest]], Callable[[], "list[Tensor]"]]
"""Puts questions and returns what waits for their answers"""
Spans = list[tuple[float, float]]
"""from when to when a question was under way, `time.monotonic()`"""


class Teacher(ABC):
    """Scores the student's completions. One number per token is all that it is ever asked for."""

    identity: str
    """names the teacher, though not each bit of its weights; a resumed run must find the same"""

    @property
    def fingerprint(self) -> str:
        """Changes with the weights, where they are in reach; what a cache goes by."""
        return self.identity

    @property
    def works_elsewhere(self) -> bool:
        """Whether it scores without the student's device, so that it may be asked while the student writes."""
        return False

    @abstractmethod
    def logprobs(self, requests: Sequence[TeacherRequest]) -> list[Tensor]:
        """Log-probs of each completion's tokens, float32 `[its length]` on the CPU, at the sampling temperature.

        A token that cannot be scored is NaN, never 0: the loss drops and counts it.
        """

    @contextmanager
    def asking(self, spans: Spans) -> Iterator[Ask]:
        """Questions of one rollout batch, put a few at a time; what is still under way when the block is left is given up.

        Leaving the block never waits. Where the work is done elsewhere it begins with the question, and `spans` is filled.
        """
        yield lambda requests: partial(self.logprobs, requests)

    def after_step(self) -> None:  # noqa: B027 (most teachers stand still)
        """The student made an optimiser step; a teacher that follows it moves."""

    def state(self) -> Mapping[str, Tensor]:
        """What a checkpoint must hold of a teacher that moves; empty for all others."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:  # noqa: B027
        """The reverse of `state`."""

    def pop_metrics(self) -> dict[str, float]:
        """What it counted since the last call, for the metrics of a step."""
        return {}

    def close(self) -> None:  # noqa: B027
        """Release connections and files."""


class DeferringTeacher(Teacher):
    """A teacher that is first asked and then waited for."""

    @abstractmethod
    def asking(self, spans: Spans) -> AbstractContextManager[Ask]: ...

    def logprobs(self, requests: Sequence[TeacherRequest]) -> list[Tensor]:
        with self.asking([]) as ask:
            return ask(requests)()


@dataclass(frozen=True, slots=True)
class Setting:
    """Where a teacher is to work: the run and its student. The model is None before weights are loaded."""

    config: RunConfig
    student_tokenizer: AnyTokenizer
    student_context: int | None
    """tokens; None when the student's model does not say"""
    student: LanguageModel | None = None
    before_work: Callable[[], None] = lambda: None
    """called by a teacher before each piece of its work, and while it waits; raises to stop the run there"""

    @property
    def temperature(self) -> float:
        return self.config.rollout.temperature


TEACHERS: dict[str, str] = {
    name: f"rlad.teachers.{name}" for name in ("local", "adapter", "served", "several", "privileged", "cached", "ema")
}
"""Type -> module, imported when it is asked for, with two functions: `check_teacher(settings, setting) -> list[Finding]` says
what can be known before weights are loaded; `make_teacher(settings, setting) -> Teacher`, called when it found no error, loads
them."""
_CHECKS = TEACHERS | {"local": "rlad.teachers.local_check"}
"""where `check_teacher` is, apart from what imports torch"""


def check_teacher(settings: Any, setting: Setting) -> list[Finding]:
    """Whether a `[teacher]` section can score this student's tokens, as far as that shows before weights are loaded."""
    return importlib.import_module(_CHECKS[settings.type]).check_teacher(settings, setting)


def make_teacher(settings: Any, setting: Setting) -> Teacher:
    """The teacher of a `[teacher]` section. `ValueError` when it cannot score this student's tokens."""
    require_no_error(settings, check_teacher(settings, setting))
    return build_teacher(settings, setting)


def build_teacher(settings: Any, setting: Setting) -> Teacher:
    """The teacher of a section in which `check_teacher` found no error, as a teacher within another one is made."""
    return importlib.import_module(TEACHERS[settings.type]).make_teacher(settings, setting)


def require_no_error(settings: Any, findings: Sequence[Finding]) -> None:
    """`ValueError` with the first error among the findings about a teacher."""
    for finding in findings:
        if finding.level == "error":
            raise ValueError(
                f"teacher {settings.title!r} cannot score the student's tokens: {finding.subject}: {finding.message}"
            )
