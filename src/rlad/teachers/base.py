"""What a teacher is: it gives the log-prob of each sampled token, of some entries of the vocabulary
or, in this process, the whole distribution."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any
from urllib.parse import quote

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlad.config.run import RunConfig
from rlad.errors import UserError
from rlad.models.loading import LanguageModel
from rlad.models.pictures import pictures_of
from rlad.models.vision import Vision
from rlad.models.without_weights import load_vision
from rlad.rollouts.types import Rollout
from rlad.scoring.columns import TokenColumns, columns_of
from rlad.scoring.distributions import TokenDistributions
from rlad.scoring.scorer import Scorer
from rlad.tasks import Problem


@dataclass(frozen=True, slots=True)
class TeacherRequest:
    """A completion that is to be scored, the prompt that it was sampled from, and what a privileged
    teacher may be shown."""

    prompt: Sequence[int]
    completion: Sequence[int]
    problem: Problem | None = None
    rollout: Rollout | None = None
    """the completion with its grade"""
    peers: Sequence[Rollout] = ()
    """the other rollouts of its group, in the group's order"""
    skill: str = ""
    """what was learnt from earlier rollouts"""
    actions: Sequence[bool] | None = None
    """which tokens of the completion the student wrote, where an environment wrote others"""


def require_texts(requests: Sequence[TeacherRequest], what: str) -> None:
    """Raise `UserError` for a request with pictures, as `what` is for texts alone."""
    if any(pictures_of(one.prompt) for one in requests):
        raise UserError(
            f"a prompt has pictures, and {what} is for texts alone; take a teacher of type 'local' "
            "that sees."
        )


@dataclass(slots=True)
class Answer:
    """The log-probs of one completion, which may still be under way."""

    result: Callable[[], Tensor]
    """waits for the log-probs, float32 `[length of the completion]` on the CPU, NaN where a token
    has none; may be called again"""
    spans: list[tuple[float, float]] = field(default_factory=list)
    """from when to when it was under way, in `time.monotonic()`: filled by the time that `result`
    returns, where that is measured"""

    @classmethod
    def finished(cls, logprobs: Tensor) -> Answer:
        """Hold log-probs that are there already."""
        return cls(lambda: logprobs)

    @classmethod
    def missing(cls, request: TeacherRequest) -> Answer:
        """Say that no token of the completion can be scored."""
        return cls.finished(torch.full((len(request.completion),), torch.nan))


class Teacher(ABC):
    """Scores the student's completions: one number per token, some columns of the vocabulary or,
    where its model is in this process, distributions."""

    identity: str
    """Names the teacher, though not each bit of its weights; a resumed run must find the same."""
    inner: Mapping[str, Teacher] = MappingProxyType({})
    """The teachers that it asks itself, by name ("" is a wrapper's only one): they move, give up
    and are closed with it; their state and metrics are its own."""

    @property
    def fingerprint(self) -> str:
        """Changes with the weights, where they are in reach; what a cache goes by."""
        return self.identity

    @property
    def works_elsewhere(self) -> bool:
        """Whether it scores without the student's device, so that it may be asked while the student
        writes."""
        return bool(self.inner) and all(one.works_elsewhere for one in self.inner.values())

    @property
    def gives_distributions(self) -> bool:
        """Whether it gives whole distributions; else it gives columns at most."""
        return bool(self.inner) and all(one.gives_distributions for one in self.inner.values())

    @property
    def needs_group(self) -> bool:
        """Whether it is shown something of the group's rollouts: their texts, or feedback."""
        return any(one.needs_group for one in self.inner.values())

    @property
    def may_be_silent(self) -> bool:
        """Whether there may be completions about which it says nothing; see `speaks`."""
        return any(one.may_be_silent for one in self.inner.values())

    def speaks(self, request: TeacherRequest) -> bool:
        """Whether it says anything about a completion; where not, it must not be asked.

        A function of the request alone, so that a resumed run finds the same.
        """
        return all(one.speaks(request) for one in self.inner.values())

    @abstractmethod
    def submit(self, requests: Sequence[TeacherRequest]) -> list[Answer]:
        """Start scoring the completions at the sampling temperature; one answer for each request.

        A token that cannot be scored is NaN, never 0: the loss drops and counts it.
        """

    def logprobs(self, requests: Sequence[TeacherRequest]) -> list[Tensor]:
        """Score the completions and wait for the answers."""
        return [answer.result() for answer in self.submit(requests)]

    def distributions(self, requests: Sequence[TeacherRequest]) -> TokenDistributions:
        """Return the next-token distributions at the sampling temperature of all completions'
        tokens, one completion after the other; a token that has none is NaN.

        For teachers whose config gives the support "full". They hold as long as the weights stay,
        within `at_work`.
        """
        raise NotImplementedError(f"{self.identity} gives no distributions")

    def columns(
        self, requests: Sequence[TeacherRequest], *, top_k: int, ids: Tensor | None = None
    ) -> TokenColumns:
        """Return the log-probs of K entries at each of all completions' tokens, and of all others
        together: of the entries `ids` [N, K], by default of its own `top_k` likeliest.

        For teachers whose config gives such a support. A token that has none is NaN.
        """
        return columns_of(self.distributions(requests), top_k, ids)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Keep the weights where they work, for several requests."""
        with ExitStack() as held:
            for teacher in self.inner.values():
                held.enter_context(teacher.at_work())
            yield

    def require_comparable(self, student: Scorer) -> None:
        """Raise `UserError` unless its distributions can be compared with the student's."""
        for teacher in self.inner.values():
            teacher.require_comparable(student)

    def cancel(self) -> None:
        """Give up all answers that are still under way; never waits for them."""
        for teacher in self.inner.values():
            teacher.cancel()

    def after_step(self) -> None:
        """The student made an optimiser step; a teacher that follows it moves."""
        for teacher in self.inner.values():
            teacher.after_step()

    def after_batch(self, index: int, *, is_skipped: bool = False) -> None:
        """The last optimiser step on rollout batch `index` (from 0) was made; `is_skipped`: it was
        the only one, and was skipped."""
        for teacher in self.inner.values():
            teacher.after_batch(index, is_skipped=is_skipped)

    def close(self) -> None:
        """Release connections and files."""
        for teacher in self.inner.values():
            teacher.close()

    def state(self) -> Mapping[str, Tensor]:
        """What a checkpoint must hold of teachers that move; empty for all others."""
        # A teacher's tensors have its name before theirs, so that two averages stay apart.
        return {
            _prefix(name) + key: tensor
            for name, teacher in self.inner.items()
            for key, tensor in teacher.state().items()
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """The reverse of `state`."""
        for name, teacher in self.inner.items():
            own = [key for key in state if key.startswith(_prefix(name))]
            teacher.load_state({key.removeprefix(_prefix(name)): state[key] for key in own})

    def pop_metrics(self) -> dict[str, float]:
        """What it counted since the last call, for the metrics of a step: `teacher/...`, of a
        teacher with a name `teacher/NAME/...`."""
        return {
            key.replace("teacher/", f"teacher/{name}/" if name else "teacher/", 1): value
            for name, teacher in self.inner.items()
            for key, value in teacher.pop_metrics().items()
        }


def _prefix(name: str) -> str:
    # As no quoted name has a slash, no teacher's prefix begins with another's.
    return f"{quote(name, safe='')}/" if name else ""


class SynchronousTeacher(Teacher):
    """A teacher that scores at once, in this process: its answers are finished."""

    @abstractmethod
    def logprobs(self, requests: Sequence[TeacherRequest]) -> list[Tensor]: ...

    def submit(self, requests: Sequence[TeacherRequest]) -> list[Answer]:
        return list(map(Answer.finished, self.logprobs(requests)))


class TeacherWrapper(Teacher):
    """A teacher that asks another one: all that a subclass does not change is that one's."""

    share_metric: str
    """the metric of `num_counted` among the `num_asked` completions"""

    def __init__(self, teacher: Teacher):
        self.teacher = teacher
        self.inner = {"": teacher}
        self.identity = teacher.identity
        self.num_asked = 0
        self.num_counted = 0

    @property
    def fingerprint(self) -> str:
        return self.teacher.fingerprint

    def pop_metrics(self) -> dict[str, float]:
        metrics = super().pop_metrics()
        if self.num_asked:
            metrics[self.share_metric] = self.num_counted / self.num_asked
        self.num_asked = 0
        self.num_counted = 0
        return metrics


@dataclass(frozen=True, slots=True)
class Setting:
    """Where a teacher is to work: the run and its student. The model is None before weights are
    loaded."""

    config: RunConfig
    student_tokenizer: PreTrainedTokenizerBase
    student_context: int | None
    """tokens; None when the student's model does not say"""
    student: LanguageModel | None = None
    before_work: Callable[[], None] = lambda: None
    """called by a teacher before each piece of its work, and while it waits; raises to stop the run
    there"""
    device: torch.device | None = None
    """of a local teacher that names none; by default the student's"""

    @property
    def vision(self) -> Vision | None:
        """The student's eyes; None where it reads text alone."""
        if self.student is not None:
            return self.student.vision
        return load_vision(self.config.student.model, self.student_tokenizer)

    @property
    def temperature(self) -> float:
        return self.config.rollout.temperature

    def scoring(self, tokens_per_batch: int) -> dict[str, Any]:
        """What a `Scorer` takes beside the model."""
        work = {"tokens_per_batch": tokens_per_batch, "before_work": self.before_work}
        return {"temperature": self.temperature, **work}
