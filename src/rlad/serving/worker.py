"""The one thread of a teacher server that computes: what has arrived is scored together, up to a
budget of tokens."""

import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from copy import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rlad.models.loading import LanguageModel
from rlad.rollouts.sampling import sample
from rlad.rollouts.types import Completion
from rlad.scoring.scorer import Scorer


@dataclass(frozen=True, slots=True)
class TokenScores:
    """Of each token of a text but the first, which nothing predicts: its log-prob, float32 `[tokens
    - 1]`.

    With `num_top` > 0 also its rank (1 is the most likely) and the most likely tokens with theirs,
    `[tokens - 1, num_top]`.
    """

    logprobs: Tensor
    ranks: Tensor | None = None
    top_ids: Tensor | None = None
    top_logprobs: Tensor | None = None

    def part(self, start: int, end: int | None) -> "TokenScores":
        """Those of the tokens from `start` to before `end`."""
        columns = (self.logprobs, self.ranks, self.top_ids, self.top_logprobs)
        logprobs, *others = (None if column is None else column[start:end] for column in columns)
        assert logprobs is not None
        return TokenScores(logprobs, *others)


@dataclass(frozen=True, slots=True, eq=False)
class ScoreJob:
    token_ids: Sequence[int]
    num_top: int
    temperature: float
    done: "Future[TokenScores]" = field(default_factory=Future)
    is_given_up: threading.Event = field(default_factory=threading.Event)

    def joins(self, other: "ScoreJob | GenerateJob") -> bool:
        """Whether one forward pass can serve both."""
        return (
            isinstance(other, ScoreJob)
            and self.num_top == other.num_top == 0
            and self.temperature == other.temperature
        )


@dataclass(frozen=True, slots=True, eq=False)
class GenerateJob:
    prompts: Sequence[Sequence[int]]
    max_tokens: int
    temperature: float
    seed: int
    done: "Future[list[Completion]]" = field(default_factory=Future)
    is_given_up: threading.Event = field(default_factory=threading.Event)

    def joins(self, other: "ScoreJob | GenerateJob") -> bool:
        return False


Job = ScoreJob | GenerateJob


class GivenUpError(Exception):
    """Nobody waits any more for what is being computed."""


class Worker:
    """Computes jobs in the order in which they come; `close` ends it."""

    def __init__(self, language_model: LanguageModel, *, tokens_per_batch: int):
        language_model.model.requires_grad_(False)
        self.language_model, self.tokens_per_batch = language_model, tokens_per_batch
        self._scorer = Scorer(language_model, temperature=1.0, tokens_per_batch=tokens_per_batch)
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._work, name="teacher", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, job: Job) -> None:
        """Sets `job.done` when it is computed, to an exception where it cannot be."""
        with self._changed:
            self._waiting.append(job)
            self._changed.notify()

    def close(self) -> None:
        """Ends the thread after the batch it is at."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join(timeout=5)

    def _work(self) -> None:
        while jobs := self._next_batch():
            jobs = [job for job in jobs if job.done.set_running_or_notify_cancel()]
            try:
                self._compute(jobs)
            except (
                Exception
            ) as error:  # a job that fails, such as for want of memory, must not end the server
                for job in jobs:
                    if not job.done.done():
                        job.done.set_exception(error)

    def _next_batch(self) -> list[Job]:
        """The job that has waited longest, with those that can be scored beside it; empty when the
        worker is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_closed)
            if self._is_closed:
                return []
            batch, left = [self._waiting.popleft()], deque[Job]()
            num_tokens = _num_tokens(batch[0])
            for job in self._waiting:
                is_taken = (
                    batch[0].joins(job) and num_tokens + _num_tokens(job) <= self.tokens_per_batch
                )
                (batch if is_taken else left).append(job)
                num_tokens += _num_tokens(job) if is_taken else 0
            self._waiting = left
            return batch

    def _compute(self, jobs: Sequence[Job]) -> None:
        if not jobs:
            return
        if isinstance(jobs[0], GenerateJob):
            jobs[0].done.set_result(self._generate(jobs[0]))
            return
        scoring = [job for job in jobs if isinstance(job, ScoreJob)]
        for job, scores in zip(scoring, self._score(scoring), strict=True):
            job.done.set_result(scores)

    def _require_someone_waits(self, jobs: Sequence[Job]) -> None:
        if self._is_closed or all(job.is_given_up.is_set() for job in jobs):
            raise GivenUpError

    def _score(self, jobs: Sequence[ScoreJob]) -> list[TokenScores]:
        scorer = copy(self._scorer)
        scorer.temperature, scorer.before_work = (
            jobs[0].temperature,
            lambda: self._require_someone_waits(jobs),
        )
        if jobs[0].num_top:
            return [score_with_top(scorer, job.token_ids, job.num_top) for job in jobs]
        long = [job for job in jobs if len(job.token_ids) > 1]
        values = iter(
            scorer.score([job.token_ids[:1] for job in long], [job.token_ids[1:] for job in long])
        )
        return [
            TokenScores(next(values) if len(job.token_ids) > 1 else torch.empty(0)) for job in jobs
        ]

    def _generate(self, job: GenerateJob) -> list[Completion]:
        longest = max(map(len, job.prompts)) + job.max_tokens
        groups = sample(
            self.language_model,
            job.prompts,
            group_size=1,
            max_completion_tokens=job.max_tokens,
            temperature=job.temperature,
            seed=job.seed,
            max_batch_rows=max(1, self.tokens_per_batch // longest),
            before_token=lambda: self._require_someone_waits([job]),
        )
        return [completion for group in groups for completion in group]


def _num_tokens(job: Job) -> int:
    return len(job.token_ids) if isinstance(job, ScoreJob) else 0


@torch.no_grad()
def score_with_top(scorer: Scorer, token_ids: Sequence[int], num_top: int) -> TokenScores:
    """The scores of one text with ranks and the `num_top` most likely tokens; logits exist for a
    chunk of tokens at a time."""
    parts, targets = (
        [],
        torch.tensor(token_ids[1:], dtype=torch.long, device=scorer.model.device)[:, None],
    )
    for logits in scorer.logits_in_chunks(token_ids):
        logprobs = logits.log_softmax(dim=-1)
        chosen, targets = logprobs.gather(1, targets[: len(logits)]), targets[len(logits) :]
        ranks = (logprobs > chosen).sum(dim=1) + 1
        top_logprobs, top_ids = logprobs.topk(num_top, dim=1)
        parts.append((chosen.squeeze(1), ranks, top_ids, top_logprobs))
    return TokenScores(*(torch.cat(column).cpu() for column in zip(*parts, strict=True)))
