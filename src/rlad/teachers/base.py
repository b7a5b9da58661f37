"""What a teacher is: it gives one log-prob for each sampled token. Imports no torch before a
teacher is made."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from rlad.config.run import RunConfig
from rlad.models.plain_tokenizer import AnyTokenizer
from rlad.tasks import Problem

if TYPE_CHECKING:
    from torch import Tensor

    from rlad.models.loading import LanguageModel


def missing_share(scores: Sequence[Tensor]) -> float:
    """The share of tokens without a finite log-prob."""
    num_tokens = sum(map(len, scores))
    return sum(int((~values.isfinite()).sum()) for values in scores) / max(num_tokens, 1)


@dataclass(frozen=True, slots=True)
class TeacherRequest:
    """A completion that is to be scored, the prompt that it was sampled from, and what a privileged
    teacher may be shown."""

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
        """Whether it scores without the student's device, so that it may be asked while the student
        writes."""
        return False

    @abstractmethod
    def logprobs(self, requests: Sequence[TeacherRequest]) -> list[Tensor]:
        """Log-probs of each completion's tokens, float32 `[its length]` on the CPU, at the sampling
        temperature.

        A token that cannot be scored is NaN, never 0: the loss drops and counts it.
        """

    @contextmanager
    def asking(self, spans: Spans) -> Iterator[Ask]:
        """Questions of one rollout batch, put a few at a time; what is still under way when the
        block is left is given up.

        Leaving the block never waits. Where the work is done elsewhere it begins with the question,
        and `spans` is filled.
        """
        yield lambda requests: partial(self.logprobs, requests)

    def after_step(self) -> None:  # noqa: B027
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
    """Where a teacher is to work: the run and its student. The model is None before weights are
    loaded."""

    config: RunConfig
    student_tokenizer: AnyTokenizer
    student_context: int | None
    """tokens; None when the student's model does not say"""
    student: LanguageModel | None = None
    before_work: Callable[[], None] = lambda: None
    """called by a teacher before each piece of its work, and while it waits; raises to stop the run
    there"""

    @property
    def temperature(self) -> float:
        return self.config.rollout.temperature
