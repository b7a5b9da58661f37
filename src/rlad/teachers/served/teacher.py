"""A teacher behind an OpenAI-compatible `/v1/completions`: vLLM, `rlad serve-teacher`, or another
that scores given tokens."""

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from itertools import takewhile
from multiprocessing import TimeoutError
from multiprocessing.pool import AsyncResult, ThreadPool

import torch
from torch import Tensor

from rlad.config.teacher import ServedTeacherConfig
from rlad.errors import UserError
from rlad.findings import Finding
from rlad.teachers.base import Answer, Setting, Teacher, TeacherRequest
from rlad.teachers.served.client import CompletionsClient, Patience, ServerUnavailableError
from rlad.teachers.served.probe import SelfTestFailed, ServerProbe, find_scoring
from rlad.teachers.served.protocol import Scoring, max_answer_bytes, read_scores, scoring_request
from rlad.teachers.served.self_test import check_server

SECONDS_BETWEEN_LOOKS = 0.2


class ServedTeacher(Teacher):
    """One request per completion, several at a time. What cannot be had is NaN; a refusal raises
    `RunFailedError`."""

    def __init__(
        self,
        client: CompletionsClient,
        settings: ServedTeacherConfig,
        *,
        scoring: Scoring,
        identity: str,
        temperature: float,
        vocabulary: int,
        context_tokens: int | None,
        before_work: Callable[[], None] = lambda: None,
    ):
        """`vocabulary` is the student's: ids beyond it are padding, which no server need know."""
        self.identity = identity
        self._client, self._settings = client, settings
        self._scoring: Scoring = scoring
        self._before_work = before_work
        self._temperature, self._vocabulary, self._context_tokens = (
            temperature,
            vocabulary,
            context_tokens,
        )
        self._pool: ThreadPool | None = None
        self._patience = Patience()
        self._submitted: list[AsyncResult] = []

    @property
    def works_elsewhere(self) -> bool:
        return True

    def submit(self, requests: Sequence[TeacherRequest]) -> list[Answer]:
        # Threads of such a pool end with the process: Ctrl-C never waits for a slow answer.
        self._pool = self._pool or ThreadPool(self._settings.max_concurrent_requests)
        # Requests are given up together, until all of them have had their answers.
        if all(answer.ready() for answer in self._submitted):
            self._patience, self._submitted = Patience(), []
        answers = []
        for request in requests:
            spans: list[tuple[float, float]] = []
            result = self._pool.apply_async(self._timed_score, (self._patience, request, spans))
            self._submitted.append(result)
            answers.append(Answer(partial(self._wait_for, result), spans))
        return answers

    def cancel(self) -> None:
        self._patience.is_over.set()
        self._submitted = []
        if self._pool is not None:
            self._pool.terminate()
            self._pool = None

    def close(self) -> None:
        self.cancel()
        self._client.close()

    def _timed_score(
        self, patience: Patience, request: TeacherRequest, spans: list[tuple[float, float]]
    ) -> Tensor:
        started = time.monotonic()
        try:
            return self._score(patience, request)
        finally:
            spans.append((started, time.monotonic()))

    def _wait_for(self, answer: AsyncResult) -> Tensor:
        """An answer; while it is not there, the run may be stopped."""
        while True:
            self._before_work()
            try:
                return answer.get(timeout=SECONDS_BETWEEN_LOOKS)
            except TimeoutError:
                continue

    def _score(self, patience: Patience, request: TeacherRequest) -> Tensor:
        """Log-probs of one completion, NaN from the first token on that the server cannot know."""
        values = torch.full((len(request.completion),), torch.nan)
        known = self._known(request)
        if not known:
            return values
        tokens = [*request.prompt, *known]
        body = scoring_request(
            self._scoring, self._settings.model, tokens, temperature=self._temperature
        )
        try:
            answer = self._client.complete(
                body, max_bytes=max_answer_bytes(len(tokens)), patience=patience
            )
        except ServerUnavailableError:
            return values
        scores = read_scores(self._scoring, answer, tokens)
        values[: len(known)] = torch.tensor(scores.logprobs[len(request.prompt) :])
        return values

    def _known(self, request: TeacherRequest) -> list[int]:
        """The completion up to its first token out of vocabulary, and one token short of the
        server's context.

        A server writes at least one token for each text that it scores, and refuses texts that
        leave no room for it.
        """
        known = list(takewhile(lambda token: token < self._vocabulary, request.completion))
        return (
            known
            if self._context_tokens is None
            else known[: max(self._context_tokens - 1 - len(request.prompt), 0)]
        )


def check_teacher(settings: ServedTeacherConfig, setting: Setting) -> list[Finding]:
    with closing(CompletionsClient(settings)) as client:
        return check_server(client, settings, setting)


def make_teacher(settings: ServedTeacherConfig, setting: Setting) -> ServedTeacher:
    """Raises `UserError` when the server has changed since it was checked."""
    client = CompletionsClient(settings)
    probes = [ServerProbe(client, url, settings, setting) for url in settings.urls]
    try:
        offers = [probe.offer() for probe in probes]
        scoring, _ = find_scoring(probes[0])
    except SelfTestFailed as error:
        client.close()
        raise UserError(f"teacher {settings.title!r} failed its self-test: {error}") from None
    return ServedTeacher(
        client,
        settings,
        scoring=scoring,
        identity=offers[0].identity,
        temperature=setting.temperature,
        vocabulary=max(setting.student_tokenizer.get_vocab().values()) + 1,
        context_tokens=min(
            (offer.context_tokens for offer in offers if offer.context_tokens), default=None
        ),
        before_work=setting.before_work,
    )
