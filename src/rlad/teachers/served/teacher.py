"""A teacher behind an OpenAI-compatible server: vLLM, `rlad serve-teacher`, or another that scores
given tokens."""

import threading
import time
from collections.abc import Sequence
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
from rlad.replicas import ServerUnavailableError
from rlad.teachers.base import Answer, Setting, Teacher, TeacherRequest
from rlad.teachers.served.client import CompletionsClient
from rlad.teachers.served.protocol import Scoring, read_scores, scoring_path, scoring_request
from rlad.teachers.served.self_test import SelfTest

SECONDS_BETWEEN_LOOKS = 0.2


class ServedTeacher(Teacher):
    """One request per completion, several at a time. What cannot be had is NaN; a refusal raises
    `RunFailedError`."""

    def __init__(
        self,
        client: CompletionsClient,
        setting: Setting,
        *,
        scoring: Scoring,
        identity: str,
        context_tokens: int | None,
    ):
        self.identity = identity
        self._client = client
        self._setting = setting
        self._scoring: Scoring = scoring
        self._context_tokens = context_tokens
        # The student's ids beyond its vocabulary are padding, which no server need know.
        self._vocabulary = max(setting.student_tokenizer.get_vocab().values()) + 1
        self._pool: ThreadPool | None = None
        self._given_up = threading.Event()
        self._submitted: list[AsyncResult] = []

    @property
    def works_elsewhere(self) -> bool:
        return True

    def submit(self, requests: Sequence[TeacherRequest]) -> list[Answer]:
        # Threads of such a pool end with the process: Ctrl-C never waits for a slow answer.
        self._pool = self._pool or ThreadPool(self._client.settings.max_concurrent_requests)
        # Requests are given up together, until all of them have had their answers.
        if all(answer.ready() for answer in self._submitted):
            self._given_up = threading.Event()
            self._submitted = []
        answers = []
        for request in requests:
            spans: list[tuple[float, float]] = []
            result = self._pool.apply_async(self._score, (request, self._given_up, spans))
            self._submitted.append(result)
            answers.append(Answer(partial(self._wait_for, result), spans))
        return answers

    def cancel(self) -> None:
        self._given_up.set()
        self._submitted = []
        if self._pool is not None:
            self._pool.terminate()
            self._pool = None

    def close(self) -> None:
        self.cancel()
        self._client.close()

    def _wait_for(self, answer: AsyncResult) -> Tensor:
        """Wait for an answer; meanwhile the run may be stopped."""
        while True:
            # This raises when the user has asked the run to stop.
            self._setting.before_work()
            try:
                return answer.get(timeout=SECONDS_BETWEEN_LOOKS)
            except TimeoutError:
                continue

    def _score(
        self, request: TeacherRequest, given_up: threading.Event, spans: list[tuple[float, float]]
    ) -> Tensor:
        """Ask for the log-probs of one completion. They are NaN from the first token on that the
        server cannot know, and all where it gives no usable answer."""
        values = torch.full((len(request.completion),), torch.nan)
        # The first id out of vocabulary ends what can be scored: later tokens depend on it.
        known = list(takewhile(lambda token: token < self._vocabulary, request.completion))
        # A server writes at least one token for each text that it scores, and refuses texts that
        # leave no room for it in its context.
        if self._context_tokens is not None:
            known = known[: max(self._context_tokens - 1 - len(request.prompt), 0)]
        if not known:
            return values
        tokens = [*request.prompt, *known]
        model = self._client.settings.model
        temperature = self._setting.temperature
        start = max(len(request.prompt), 1)
        body = scoring_request(self._scoring, model, tokens, start=start, temperature=temperature)
        started = time.monotonic()
        try:
            answer = self._client.complete(
                scoring_path(self._scoring),
                body,
                given_up=given_up,
                read=lambda url, answer: answer,
            )
        except ServerUnavailableError:
            return values
        finally:
            spans.append((started, time.monotonic()))
        scores = read_scores(self._scoring, answer, tokens, start=start)[len(request.prompt) :]
        values[: len(known)] = torch.tensor([score.logprob for score in scores])
        return values


def check_teacher(settings: ServedTeacherConfig, setting: Setting) -> list[Finding]:
    """Test the server before training."""
    with closing(CompletionsClient(settings)) as client:
        return SelfTest(client, setting).findings()


def make_teacher(settings: ServedTeacherConfig, setting: Setting) -> ServedTeacher:
    """Raise `UserError` when the server has changed since it was checked."""
    client = CompletionsClient(settings)
    test = SelfTest(client, setting)
    # The check ran the whole self-test; what the run relies on is asked again, as the server may
    # have been restarted with another model since.
    last = test.findings("server", "scoring")[-1]
    if last.level == "error":
        client.close()
        raise UserError(f"teacher {settings.title!r} failed its self-test: {last.message}")
    return ServedTeacher(
        client,
        setting,
        scoring=test.scoring,
        identity=test.identity,
        context_tokens=test.context,
    )
