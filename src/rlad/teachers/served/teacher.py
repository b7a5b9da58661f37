"""A teacher on an OpenAI-compatible server: vLLM, `rlad serve-teacher`, or another server that
scores given tokens."""

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from itertools import takewhile
from multiprocessing import TimeoutError
from multiprocessing.pool import AsyncResult, ThreadPool
from typing import Any

import torch
from torch import Tensor

from rlad.config.teacher import ServedTeacherConfig
from rlad.errors import UserError
from rlad.findings import Finding
from rlad.models.pictures import PicturedPrompt, pictures_of
from rlad.models.vision import Vision
from rlad.replicas import ServerUnavailableError
from rlad.scoring.columns import TokenColumns
from rlad.scoring.scorer import Scorer
from rlad.teachers.base import Answer, Setting, Teacher, TeacherRequest, require_texts
from rlad.teachers.served.client import CompletionsClient
from rlad.teachers.served.columns import column_request, column_scoring, read_columns
from rlad.teachers.served.pictures import PATH, picture_request, read_picture_scores
from rlad.teachers.served.protocol import (
    Scoring,
    TokenScore,
    read_scores,
    scoring_path,
    scoring_request,
)
from rlad.teachers.served.self_test import SelfTest

SECONDS_BETWEEN_LOOKS = 0.2


class ServedTeacher(Teacher):
    """A teacher on a server. It sends one request per completion, several at a time. What the
    server cannot score is NaN; a refusal raises `RunFailedError`."""

    def __init__(
        self,
        client: CompletionsClient,
        setting: Setting,
        *,
        scoring: Scoring,
        identity: str,
        context_tokens: int | None,
        takes_pictures: bool = False,
    ):
        """Take in `context_tokens` how many tokens of prompt and completion the server can
        score."""
        self.identity = identity
        self._client = client
        self._setting = setting
        self._scoring: Scoring = scoring
        self._context_tokens = context_tokens
        self._takes_pictures = takes_pictures
        # The student's ids beyond its vocabulary are padding, which a server need not know.
        self._vocabulary = max(setting.student_tokenizer.get_vocab().values()) + 1
        self._pool: ThreadPool | None = None
        self._given_up = threading.Event()
        self._submitted: list[AsyncResult] = []

    @property
    def works_elsewhere(self) -> bool:
        return True

    def submit(self, requests: Sequence[TeacherRequest]) -> list[Answer]:
        if not self._takes_pictures:
            require_texts(requests, "this server")
        for one in requests:
            for picture in pictures_of(one.prompt):
                # Made here, since a tokenizer must stay in one thread.
                self._vision.ids_of(picture)
        return [
            Answer(partial(self._wait_for, result), spans)
            for result, spans in self._start([partial(self._score, one) for one in requests])
        ]

    def columns(
        self, requests: Sequence[TeacherRequest], *, top_k: int, ids: Tensor | None = None
    ) -> TokenColumns:
        require_texts(requests, "a server")
        lengths = [len(one.completion) for one in requests]
        own_ids = [None] * len(requests) if ids is None else ids.cpu().split(lengths)
        started = self._start(
            [
                partial(self._columns, one, top_k, own)
                for one, own in zip(requests, own_ids, strict=True)
            ]
        )
        parts = [self._wait_for(result) for result, _ in started]
        return TokenColumns.joined([TokenColumns.missing(0, top_k), *parts])

    def require_comparable(self, student: Scorer) -> None:
        if student.head is None:
            raise UserError(
                "the student's most likely tokens cannot be compared with a teacher's, because its "
                "logits are not a linear function of its hidden states; use objective=opd, which "
                "compares only the sampled tokens."
            )

    def _start(
        self, jobs: Sequence[Callable[..., Any]]
    ) -> list[tuple[AsyncResult, list[tuple[float, float]]]]:
        """Start requests, several at a time; return each with the list of its spans."""
        # Threads of such a pool end with the process: Ctrl-C never waits for a slow answer.
        self._pool = self._pool or ThreadPool(self._client.settings.max_concurrent_requests)
        # Requests are cancelled together, unless all of them have been answered.
        if all(answer.ready() for answer in self._submitted):
            self._given_up = threading.Event()
            self._submitted = []
        started = []
        for job in jobs:
            spans: list[tuple[float, float]] = []
            result = self._pool.apply_async(job, (self._given_up, spans))
            self._submitted.append(result)
            started.append((result, spans))
        return started

    def cancel(self) -> None:
        self._given_up.set()
        self._submitted = []
        if self._pool is not None:
            self._pool.terminate()
            self._pool = None

    def close(self) -> None:
        self.cancel()
        self._client.close()

    def _wait_for(self, answer: AsyncResult) -> Any:
        """Wait for an answer; the run may be stopped while waiting."""
        while True:
            # This raises if the user has asked the run to stop.
            self._setting.before_work()
            try:
                return answer.get(timeout=SECONDS_BETWEEN_LOOKS)
            except TimeoutError:
                continue

    def _score(
        self, request: TeacherRequest, given_up: threading.Event, spans: list[tuple[float, float]]
    ) -> Tensor:
        """Ask for the log-probs of one completion. They are NaN from the first token on that the
        server does not know, and all NaN if it gives no usable answer."""
        values = torch.full((len(request.completion),), torch.nan)
        num_known = self._num_known(request)
        if not num_known:
            return values
        tokens = [*request.prompt, *request.completion[:num_known]]
        start = max(len(request.prompt), 1)
        body = scoring_request(
            self._scoring,
            self._client.settings.model,
            tokens,
            start=start,
            temperature=self._setting.temperature,
        )
        if isinstance(request.prompt, PicturedPrompt):
            return self._score_pictured(request.prompt, tokens[start:], values, given_up, spans)
        answer = self._ask(scoring_path(self._scoring), body, given_up, spans)
        if answer is not None:
            scores = read_scores(self._scoring, answer, tokens, start=start)[len(request.prompt) :]
            values[:num_known] = torch.tensor([score.logprob for score in scores])
        return values

    @property
    def _vision(self) -> Vision:
        """Return the student's picture processor, whose tokens are sent for pictures."""
        vision = self._setting.vision
        assert vision is not None
        return vision

    def _score_pictured(
        self,
        prompt: PicturedPrompt,
        completion: Sequence[int],
        values: Tensor,
        given_up: threading.Event,
        spans: list[tuple[float, float]],
    ) -> Tensor:
        """Fill in the log-probs of a completion of a prompt with pictures."""
        model = self._client.settings.model
        body = picture_request(self._scoring, model, prompt, completion, self._vision)
        tokens = [*prompt, *completion]

        def read(url: str, answer: dict[str, Any]) -> list[TokenScore]:
            return read_picture_scores(self._scoring, answer, tokens, start=len(prompt), url=url)

        scores = self._ask(PATH, body, given_up, spans, read=read)
        if scores is not None:
            values[: len(scores)] = torch.tensor([score.logprob for score in scores])
        return values

    def _columns(
        self,
        request: TeacherRequest,
        top_k: int,
        ids: Tensor | None,
        given_up: threading.Event,
        spans: list[tuple[float, float]],
    ) -> TokenColumns:
        """Ask for the columns of one completion. They are NaN where `_score` gives NaN, and for ids
        that are padding of the student's vocabulary."""
        whole = TokenColumns.missing(len(request.completion), top_k)
        num_known = self._num_known(request)
        if not num_known or not request.prompt:
            return whole
        tokens = [*request.prompt, *request.completion[:num_known]]
        scoring = column_scoring(self._scoring, ids)
        student = self._setting.student
        assert student is not None
        is_padding = torch.zeros(num_known, dtype=torch.bool)
        if ids is not None:
            is_padding = (ids[:num_known] >= self._vocabulary).any(dim=1)
            ids = ids[:num_known].masked_fill(is_padding[:, None], 0)
        about: dict[str, Any] = {"start": len(request.prompt), "top_k": top_k, "ids": ids}
        body = column_request(
            scoring,
            self._client.settings.model,
            tokens,
            temperature=self._setting.temperature,
            **about,
        )
        answer = self._ask(scoring_path(scoring), body, given_up, spans)
        if answer is None:
            return whole
        found = read_columns(scoring, answer, tokens, vocabulary=student.vocabulary, **about)
        found.logprobs[is_padding] = torch.nan
        return found.placed(torch.arange(num_known), len(request.completion))

    def _num_known(self, request: TeacherRequest) -> int:
        """Return how many of a completion's tokens the server can score."""
        # The first id outside the vocabulary ends what can be scored, since later tokens depend on
        # it.
        known = sum(
            1 for _ in takewhile(lambda token: token < self._vocabulary, request.completion)
        )
        if self._context_tokens is None:
            return known
        return min(known, max(self._context_tokens - len(request.prompt), 0))

    def _ask(
        self,
        path: str,
        body: dict[str, Any],
        given_up: threading.Event,
        spans: list[tuple[float, float]],
        *,
        read: Callable[[str, dict[str, Any]], Any] = lambda url, answer: answer,
    ) -> Any:
        """Send one request, and `read` the answer; None if it is not usable."""
        started = time.monotonic()
        try:
            return self._client.complete(path, body, given_up=given_up, read=read)
        except ServerUnavailableError:
            return None
        finally:
            spans.append((started, time.monotonic()))


def check_teacher(settings: ServedTeacherConfig, setting: Setting) -> list[Finding]:
    """Test the server before training."""
    with closing(CompletionsClient(settings)) as client:
        return SelfTest(client, setting).findings()


def make_teacher(settings: ServedTeacherConfig, setting: Setting) -> ServedTeacher:
    """Make the teacher. Raises `UserError` if the server has changed since it was checked."""
    client = CompletionsClient(settings)
    test = SelfTest(client, setting)
    # The check ran the whole self-test. What the run relies on is checked again, since the server
    # may have been restarted with another model.
    last = test.findings("server", "scoring", "pictures")[-1]
    if last.level == "error":
        client.close()
        raise UserError(f"teacher {settings.title!r} failed its self-test: {last.message}")
    return ServedTeacher(
        client,
        setting,
        scoring=test.scoring,
        identity=test.identity,
        context_tokens=test.scored_context,
        takes_pictures=test.takes_pictures,
    )


def scored_context(settings: ServedTeacherConfig, setting: Setting) -> int | None:
    """Ask a server how many tokens of prompt and completion it can score; None if it does not say.
    Raises `UserError` if it does not answer."""
    with closing(CompletionsClient(settings)) as client:
        test = SelfTest(client, setting)
        last = test.findings("server")[-1]
    if last.level == "error":
        raise UserError(f"teacher {settings.title!r} failed its self-test: {last.message}")
    return test.scored_context
