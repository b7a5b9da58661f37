"""The interface of all teachers. A teacher gives the log-prob of each sampled token, of some
entries of the vocabulary or, if its model is in this process, the whole distribution."""

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
    """A completion to score, the prompt that it was sampled from, and what a privileged teacher may
    be shown."""

    prompt: Sequence[int]
    completion: Sequence[int]
    problem: Problem | None = None
    rollout: Rollout | None = None
    """the completion with its grade"""
    peers: Sequence[Rollout] = ()
    """the other rollouts of the group, in the group's order"""
    skill: str = ""
    """a text of what was learnt from earlier rollouts"""
    actions: Sequence[bool] | None = None
    """which tokens of the completion the student wrote, if an environment wrote the others"""


def require_texts(requests: Sequence[TeacherRequest], what: str) -> None:
    """Raise `UserError` for a request with pictures, since `what` supports only texts."""
    if any(pictures_of(one.prompt) for one in requests):
        raise UserError(
            f"a prompt has pictures, but {what} supports only texts; use a teacher of type 'local' "
            "that reads pictures."
        )


@dataclass(slots=True)
class Answer:
    """The log-probs of one completion, which may still be computed."""

    result: Callable[[], Tensor]
    """waits for the log-probs, float32 `[length of the completion]` on the CPU, NaN where a token
    has none; may be called again"""
    spans: list[tuple[float, float]] = field(default_factory=list)
    """start and end of the work on it, in `time.monotonic()`; complete once `result` has returned,
    and empty if not measured"""

    @classmethod
    def finished(cls, logprobs: Tensor) -> Answer:
        """Make an answer from log-probs that are already known."""
        return cls(lambda: logprobs)

    @classmethod
    def missing(cls, request: TeacherRequest) -> Answer:
        """Make an answer in which no token of the completion can be scored."""
        return cls.finished(torch.full((len(request.completion),), torch.nan))


class Teacher(ABC):
    """A model that scores the student's completions. It gives one number per token, some columns of
    the vocabulary or, if its model is in this process, distributions."""

    identity: str
    """Names the teacher, though not every bit of its weights. A resumed run must find the same."""
    inner: Mapping[str, Teacher] = MappingProxyType({})
    """The teachers inside it, by name ("" for a wrapper's only one). Updates, cancelling and
    closing are passed on to them; their state and metrics are part of its own."""

    @property
    def fingerprint(self) -> str:
        """A key for caches. It changes with the weights, if they are within reach."""
        return self.identity

    @property
    def works_elsewhere(self) -> bool:
        """Whether it scores without the student's device, so that it can work while the student
        samples."""
        return bool(self.inner) and all(one.works_elsewhere for one in self.inner.values())

    @property
    def gives_distributions(self) -> bool:
        """Whether it gives whole distributions; otherwise it gives columns at most."""
        return bool(self.inner) and all(one.gives_distributions for one in self.inner.values())

    @property
    def needs_group(self) -> bool:
        """Whether its prompts contain something from the group's rollouts: texts, or feedback."""
        return any(one.needs_group for one in self.inner.values())

    @property
    def may_be_silent(self) -> bool:
        """Whether there may be completions that it does not score; see `speaks`."""
        return any(one.may_be_silent for one in self.inner.values())

    def speaks(self, request: TeacherRequest) -> bool:
        """Return whether it scores a completion. If not, it must not be asked.

        The result depends only on the request, so that a resumed run finds the same.
        """
        return all(one.speaks(request) for one in self.inner.values())

    @abstractmethod
    def submit(self, requests: Sequence[TeacherRequest]) -> list[Answer]:
        """Start scoring the completions at the sampling temperature; return one answer per request.

        A token that cannot be scored is NaN, never 0. The loss drops and counts such tokens.
        """

    def logprobs(self, requests: Sequence[TeacherRequest]) -> list[Tensor]:
        """Score the completions, and wait for the results."""
        return [answer.result() for answer in self.submit(requests)]

    def distributions(self, requests: Sequence[TeacherRequest]) -> TokenDistributions:
        """Return the next-token distributions at the sampling temperature for the tokens of all
        completions, one completion after the other. A token without a distribution is NaN.

        For teachers whose config gives the support "full". Distributions are valid only while the
        weights do not change or move, within `at_work`.
        """
        raise NotImplementedError(f"{self.identity} gives no distributions")

    def columns(
        self, requests: Sequence[TeacherRequest], *, top_k: int, ids: Tensor | None = None
    ) -> TokenColumns:
        """Return the log-probs of K entries at each token of all completions, and of all other
        entries merged into one. The entries are `ids` [N, K], by default its own `top_k` most
        likely ones.

        For teachers whose config gives such a support. A token without columns is NaN.
        """
        return columns_of(self.distributions(requests), top_k, ids)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Keep the weights on the device where they compute, for several requests."""
        with ExitStack() as held:
            for teacher in self.inner.values():
                held.enter_context(teacher.at_work())
            yield

    def require_comparable(self, student: Scorer) -> None:
        """Raise `UserError` unless its distributions can be compared with the student's."""
        for teacher in self.inner.values():
            teacher.require_comparable(student)

    def cancel(self) -> None:
        """Give up all answers that are not finished, without waiting for them."""
        for teacher in self.inner.values():
            teacher.cancel()

    def after_step(self) -> None:
        """Update a teacher that follows the student, after an optimiser step of the student."""
        for teacher in self.inner.values():
            teacher.after_step()

    def after_batch(self, index: int, *, is_skipped: bool = False) -> None:
        """Update a teacher that follows the student, after the last optimiser step on rollout batch
        `index` (from 0). `is_skipped`: it was the batch's only step, and was skipped."""
        for teacher in self.inner.values():
            teacher.after_batch(index, is_skipped=is_skipped)

    def close(self) -> None:
        """Release connections and files."""
        for teacher in self.inner.values():
            teacher.close()

    def state(self) -> Mapping[str, Tensor]:
        """Return what a checkpoint must store of teachers that change; empty for all others."""
        # The teacher's name is a prefix of its tensors' names, so that two averages do not clash.
        return {
            _prefix(name) + key: tensor
            for name, teacher in self.inner.items()
            for key, tensor in teacher.state().items()
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Load what `state` returned."""
        for name, teacher in self.inner.items():
            own = [key for key in state if key.startswith(_prefix(name))]
            teacher.load_state({key.removeprefix(_prefix(name)): state[key] for key in own})

    def pop_metrics(self) -> dict[str, float]:
        """Return its metrics since the last call, for the metrics of a step: `teacher/...`, or
        `teacher/NAME/...` for a teacher with a name."""
        return {
            key.replace("teacher/", f"teacher/{name}/" if name else "teacher/", 1): value
            for name, teacher in self.inner.items()
            for key, value in teacher.pop_metrics().items()
        }


def _prefix(name: str) -> str:
    # No quoted name has a slash, so no teacher's prefix begins with another's.
    return f"{quote(name, safe='')}/" if name else ""


class SynchronousTeacher(Teacher):
    """A teacher that scores immediately, in this process, and returns finished answers."""

    @abstractmethod
    def logprobs(self, requests: Sequence[TeacherRequest]) -> list[Tensor]: ...

    def submit(self, requests: Sequence[TeacherRequest]) -> list[Answer]:
        return list(map(Answer.finished, self.logprobs(requests)))


class TeacherWrapper(Teacher):
    """A teacher that forwards everything to another teacher, except what a subclass overrides."""

    share_metric: str
    """name of the metric `num_counted` / `num_asked` completions"""

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
    """What a teacher needs to know of the run and its student. The model is None before weights are
    loaded."""

    config: RunConfig
    student_tokenizer: PreTrainedTokenizerBase
    student_context: int | None
    """in tokens; None if the student's model does not state it"""
    student: LanguageModel | None = None
    before_work: Callable[[], None] = lambda: None
    """called by a teacher before each piece of its work, and while it waits; it may raise to stop
    the run"""
    device: torch.device | None = None
    """device of a local teacher that names none; by default the student's"""

    @property
    def vision(self) -> Vision | None:
        """The student's picture processor; None if it reads only text."""
        if self.student is not None:
            return self.student.vision
        return load_vision(self.config.student.model, self.student_tokenizer)

    @property
    def temperature(self) -> float:
        return self.config.rollout.temperature

    def scoring(self, tokens_per_batch: int) -> dict[str, Any]:
        """Return the arguments of a `Scorer` besides the model."""
        work = {"tokens_per_batch": tokens_per_batch, "before_work": self.before_work}
        return {"temperature": self.temperature, **work}
