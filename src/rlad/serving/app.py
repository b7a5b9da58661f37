"""A small teacher server based on transformers. It supports the part of vLLM's `/v1/completions`
that distillation needs.

It is made for runs that trust each other. A public server should be vLLM.
"""

import asyncio
import hmac
import random
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response

from rlad.errors import RladError, UserError
from rlad.models.loading import LanguageModel
from rlad.rollouts.sampling import sample
from rlad.scoring.scorer import Scorer
from rlad.serving.protocol import CompletionRequest, completion_choice, parse_request

MAX_REQUEST_BYTES = 16 * 2**20
UVICORN_SETTINGS: dict[str, Any] = {
    "http": "h11",
    "ws": "none",
    "access_log": False,
    "log_level": "error",
    # Bounds of what clients may hold: connections, idle seconds, bytes of a header.
    "limit_concurrency": 256,
    "timeout_keep_alive": 60,
    "timeout_graceful_shutdown": 5,
    "h11_max_incomplete_event_size": 16 * 1024,
}


@dataclass(slots=True, eq=False)
class Job:
    """A request that waits for its answer."""

    asked: CompletionRequest
    client: Request
    answer: dict[str, Any] | Exception = field(
        default_factory=lambda: HTTPException(503, "the request was given up.")
    )


class TeacherServer:
    """The server's routes, and the queue of requests that wait for the model."""

    def __init__(
        self,
        language_model: LanguageModel,
        *,
        served_name: str,
        max_context_tokens: int,
        tokens_per_batch: int,
        api_key: str | None = None,
    ):
        """`/v1/*` wants the key, if there is one, as a bearer token."""
        language_model.model.requires_grad_(False)
        self.language_model = language_model
        self.served_name = served_name
        self.max_context_tokens = max_context_tokens
        self.tokens_per_batch = tokens_per_batch
        self.api_key = api_key
        self.waiting: list[Job] = []
        self.computing = asyncio.Lock()
        self.is_closing = False
        # Answers repeat the same tokens, and decoding them one by one is slow.
        self.text_of = lru_cache(200_000)(self._text_of)
        self.scorer_at = lru_cache(8)(self._make_scorer)
        self.scorer_at(1.0)  # looks at the model's output layer now, not in the first request

    def app(self) -> FastAPI:
        @asynccontextmanager
        async def lifespan(_: FastAPI) -> AsyncIterator[None]:
            yield
            self.is_closing = True

        app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
        app.add_exception_handler(UserError, _bad_request)
        app.add_api_route("/health", self.health, methods=["GET"])
        app.add_api_route("/v1/models", self.models, methods=["GET"])
        app.add_api_route("/v1/completions", self.completions, methods=["POST"])
        return app

    async def health(self) -> Response:
        return Response()

    async def models(self, request: Request) -> JSONResponse:
        self._require_key(request)
        model = {
            "id": self.served_name,
            "root": self.language_model.name,
            "max_model_len": self.max_context_tokens,
        }
        return JSONResponse({"object": "list", "data": [model]})

    async def completions(self, request: Request) -> JSONResponse:
        self._require_key(request)
        # The size is looked at before the body is read into memory.
        size = request.headers.get("content-length")
        is_short = size is not None and int(size) <= MAX_REQUEST_BYTES
        most = MAX_REQUEST_BYTES // 2**20
        _require(is_short, 413, f"a request must have a Content-Length of at most {most} MiB.")
        asked = parse_request(await request.body())
        self._require_possible(asked)
        job = Job(asked, request)
        self.waiting.append(job)
        # All requests that came in during the last computation form one batch, which the first of
        # them computes: on a busy server batches grow by themselves, on an idle one nobody waits.
        async with self.computing:
            if job in self.waiting:
                await self._compute_waiting()
        if isinstance(job.answer, Exception):
            raise job.answer
        answer = {"object": "text_completion", "model": asked.model, "choices": [job.answer]}
        return JSONResponse(answer)

    async def _compute_waiting(self) -> None:
        jobs = self.waiting
        self.waiting = []
        # A client that has gone may have sent its request again: nobody needs this answer.
        jobs = [job for job in jobs if not await job.client.is_disconnected()]
        answers: Sequence[dict[str, Any] | Exception]
        try:
            # A thread computes, so that the event loop can take requests and health checks
            # meanwhile.
            answers = await asyncio.to_thread(self.compute, [job.asked for job in jobs])
        except (RuntimeError, RladError) as error:  # of PyTorch, or of the sampler
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            failure = HTTPException(500, f"the model could not compute this: {reason}")
            answers = [failure] * len(jobs)
        for job, answer in zip(jobs, answers, strict=True):
            job.answer = answer

    def compute(self, requests: Sequence[CompletionRequest]) -> list[dict[str, Any]]:
        """Write and score what is requested. Plain scores at one temperature share forward
        passes."""
        texts = [self._written(asked) for asked in requests]
        scores: dict[int, list[dict[int, float]]] = {}
        # Scores without alternatives need no logits over the vocabulary in memory, so many texts of
        # one temperature share a forward pass; the others are computed one by one.
        plain = defaultdict[float, list[int]](list)
        for i, asked in enumerate(requests):
            if asked.prompt_logprobs:
                scores[i] = self._scores_with_likeliest(asked, texts[i])
            else:
                plain[asked.score_temperature].append(i)
        for temperature, rows in plain.items():
            score = self.scorer_at(temperature).score
            found = score([texts[i][:1] for i in rows], [texts[i][1:] for i in rows])
            for i, values in zip(rows, found, strict=True):
                pairs = zip(texts[i][1:], values.tolist(), strict=True)
                scores[i] = [{}, *({token: value} for token, value in pairs)]
        return [
            completion_choice(asked, texts[i], scores[i], self.text_of)
            for i, asked in enumerate(requests)
        ]

    def _written(self, asked: CompletionRequest) -> list[int]:
        """Return the prompt with the tokens that the model writes after it, if any are wanted."""
        if not asked.num_new_tokens:
            return asked.prompt
        (completion,) = sample(
            self.language_model,
            [asked.prompt],
            group_size=1,
            max_completion_tokens=asked.num_new_tokens,
            temperature=asked.temperature,
            seed=random.getrandbits(62),
            before_token=self._require_open,
        )[0]
        return [*asked.prompt, *completion.token_ids]

    @torch.no_grad()
    def _scores_with_likeliest(
        self, asked: CompletionRequest, tokens: Sequence[int]
    ) -> list[dict[int, float]]:
        """Score one text with its most likely tokens; logits exist for some positions at a time."""
        scores: list[dict[int, float]] = [{}]
        for logits in self.scorer_at(asked.score_temperature).logits_in_chunks(tokens):
            # Each chunk predicts the tokens that follow those scored already.
            logprobs = logits.log_softmax(dim=-1)
            top = logprobs.topk(asked.prompt_logprobs or 0, dim=1)
            given = tokens[len(scores) : len(scores) + len(logits)]
            values = logprobs[range(len(given)), given].tolist()
            likeliest = zip(top.indices.tolist(), top.values.tolist(), strict=True)
            for token, value, others in zip(given, values, likeliest, strict=True):
                scores.append({token: value} | dict(zip(*others, strict=True)))
        return scores

    def _text_of(self, token: int) -> str:
        return str(self.language_model.tokenizer.decode([token]))

    def _make_scorer(self, temperature: float) -> Scorer:
        return Scorer(
            self.language_model,
            temperature=temperature,
            tokens_per_batch=self.tokens_per_batch,
            before_work=self._require_open,
        )

    def _require_open(self) -> None:
        """Stop between forward passes when the server ends."""
        if self.is_closing:
            raise RuntimeError("the server is being stopped")

    def _require_key(self, request: Request) -> None:
        given = request.headers.get("authorization", "").encode("latin-1")
        # The comparison takes the same time for every key, so a guess learns nothing from it.
        wanted = f"Bearer {self.api_key}".encode()
        is_right = self.api_key is None or hmac.compare_digest(given, wanted)
        message = "the API key is missing or wrong; send it as `Authorization: Bearer KEY`."
        _require(is_right, 401, message)

    def _require_possible(self, asked: CompletionRequest) -> None:
        vocabulary = self.language_model.vocabulary
        largest = max(asked.prompt)
        length = len(asked.prompt)
        is_here = asked.model == self.served_name
        _require(
            is_here, 404, f"model {asked.model!r} is not served here; {self.served_name!r} is."
        )
        message = f"token id {largest} is out of the model's vocabulary of {vocabulary} tokens."
        _require(largest < vocabulary, 400, message)
        message = (
            f"a prompt of {length} tokens and max_tokens {asked.num_new_tokens} are more than the "
            f"context of {self.max_context_tokens} tokens."
        )
        _require(length + asked.num_new_tokens <= self.max_context_tokens, 400, message)


def _require(condition: bool, status: int, message: str) -> None:
    """Refuse a request with one sentence unless the condition holds."""
    if not condition:
        raise HTTPException(status, message)


async def _bad_request(_: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"detail": str(error)}, 400)
