"""A small teacher server over transformers: the `/v1/completions` of vLLM as far as distillation
asks for it.

Requests that arrive together are scored together. Log-probs told are the model's own, whatever the
request's `temperature`, as vLLM's are; `"temper_prompt_logprobs": true` applies it.
"""

import asyncio
import hmac
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.requests import ClientDisconnect

from rlad.errors import UserError
from rlad.models.loading import LanguageModel
from rlad.rollouts.types import Completion
from rlad.serving.limits import AnswerInPieces, Room
from rlad.serving.protocol import (
    AnswerWriter,
    CompletionRequest,
    ScoredText,
    parse_request,
    prompt_token_ids,
)
from rlad.serving.worker import GenerateJob, Job, ScoreJob, TokenScores, Worker

MAX_PROMPTS = 1024
MAX_LOGPROBS_PER_ANSWER = 500_000  # about 300 MB as Python objects and JSON
MAX_LOGPROBS_HELD = 2 * MAX_LOGPROBS_PER_ANSWER
"""of all requests that are being computed, written or sent; others wait"""
MAX_REQUESTS_HELD = 4
"""of the largest size: as many bytes may the requests have together that are being read or
answered"""
_SECONDS_BETWEEN_LOOKS = 1.0
_THEN_CLOSE = {"Connection": "close"}
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class ServerSettings:
    served_name: str
    api_key: str | None
    max_request_bytes: int
    max_context_tokens: int
    tokens_per_batch: int
    request_seconds: float = 60.0
    """within which a request must have come"""


def make_app(language_model: LanguageModel, settings: ServerSettings) -> FastAPI:
    """The server's routes. `/v1/*` wants the bearer token where there is an API key; `/health` does
    not."""
    server = TeacherServer(language_model, settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        server.worker.close()

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.server = server
    app.add_api_route("/health", server.health, methods=["GET"])
    app.add_api_route("/v1/models", server.models, methods=["GET"])
    app.add_api_route("/v1/completions", server.completions, methods=["POST"])
    app.add_exception_handler(AnyHTTPException, _tell_error)
    return app


async def _tell_error(_: Request, error: Any) -> JSONResponse:
    kind = {400: "BadRequestError", 401: "AuthenticationError", 404: "NotFoundError"}.get(
        error.status_code, "ServerError"
    )
    content = {
        "error": {"message": error.detail, "type": kind, "param": None, "code": error.status_code}
    }
    return JSONResponse(content, error.status_code, headers=error.headers)


class TeacherServer:
    """Answers requests; all computing is the worker's."""

    def __init__(self, language_model: LanguageModel, settings: ServerSettings):
        self.language_model, self.settings = language_model, settings
        self.worker = Worker(language_model, tokens_per_batch=settings.tokens_per_batch)
        self.writer = AnswerWriter(language_model.tokenizer)
        self.started = int(time.time())
        self.room, self.held_bytes = Room(MAX_LOGPROBS_HELD), 0

    async def health(self) -> Response:
        return Response(status_code=200 if self.worker.is_alive else 503)

    async def models(self, request: Request) -> dict[str, Any]:
        self._require_key(request)
        model = {
            "id": self.settings.served_name,
            "object": "model",
            "created": self.started,
            "owned_by": "rlad",
            "root": self.language_model.name,
            "parent": None,
            "max_model_len": self.settings.max_context_tokens,
        }
        return {"object": "list", "data": [model]}

    async def completions(self, request: Request) -> Response:
        self._require_key(request)
        body = bytearray()
        try:
            await self._read(request, body)
            # Long requests are read, and long answers written, beside the event loop, so that
            # others are heard meanwhile.
            asked, prompts, num_logprobs = await asyncio.to_thread(self._understand, body)
            room = await self._unless_gone(request, self.room.take(num_logprobs))
            give_back = partial(self.room.give_back, room)
            try:
                texts = await self._unless_gone(request, self._texts(asked, prompts))
                return AnswerInPieces(
                    await asyncio.to_thread(self._answer, asked, texts), then=give_back
                )
            except BaseException:
                give_back()
                raise
        finally:
            self.held_bytes -= len(body)

    def _understand(self, body: bytearray) -> tuple[CompletionRequest, list[list[int]], int]:
        """What is asked, the prompts as token ids, and how many log-probs the answer may hold."""
        try:
            asked = parse_request(body)
            if asked.model != self.settings.served_name:
                raise HTTPException(
                    404,
                    f"model {asked.model!r} is not served here; {self.settings.served_name!r} is.",
                )
            prompts = prompt_token_ids(
                asked, self.language_model.tokenizer, self.settings.max_context_tokens
            )
            return asked, prompts, self._require_size(asked, prompts)
        except ValueError as error:
            raise HTTPException(400, str(error)) from None

    def _answer(self, asked: CompletionRequest, texts: Sequence[ScoredText]) -> bytes:
        num_prompt = sum(len(text.prompt) for text in texts)
        num_generated = sum(len(text.completion.token_ids) for text in texts)
        answer = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": self.settings.served_name,
            "choices": [self.writer.choice(i, asked, text) for i, text in enumerate(texts)],
            "usage": {
                "prompt_tokens": num_prompt,
                "completion_tokens": num_generated,
                "total_tokens": num_prompt + num_generated,
            },
        }
        return bytes(JSONResponse(answer).body)

    def _require_key(self, request: Request) -> None:
        if self.settings.api_key is None:
            return
        given = request.headers.get("authorization", "").encode("latin-1")
        if not hmac.compare_digest(given, f"Bearer {self.settings.api_key}".encode()):
            raise HTTPException(
                401, "the API key is missing or wrong; send it as `Authorization: Bearer KEY`."
            )

    async def _read(self, request: Request, body: bytearray) -> None:
        """Counted while it comes: the header may be missing or lie."""
        limit, seconds = self.settings.max_request_bytes, self.settings.request_seconds
        try:
            async with asyncio.timeout(seconds):
                async for piece in request.stream():
                    body += piece
                    self.held_bytes += len(piece)
                    if len(body) > limit:
                        raise HTTPException(
                            413,
                            f"the request is larger than {limit / 2**20:g} MiB; send fewer prompts "
                            "at once, "
                            "or start the server with a larger --max-request-mib.",
                            headers=_THEN_CLOSE,
                        )
                    if self.held_bytes > limit * MAX_REQUESTS_HELD:
                        headers = _THEN_CLOSE | {"Retry-After": "1"}
                        raise HTTPException(
                            503,
                            "the server holds too many large requests; send it again.",
                            headers=headers,
                        )
        except ClientDisconnect:
            raise HTTPException(499, "the client has gone.") from None
        except TimeoutError:
            raise HTTPException(
                408, f"the request did not come within {seconds:g} seconds.", headers=_THEN_CLOSE
            ) from None

    def _require_size(self, asked: CompletionRequest, prompts: Sequence[Sequence[int]]) -> int:
        """How many log-probs the answer may hold. `UserError` for prompts that the model cannot
        take, or too many of them."""
        vocabulary, context = self.language_model.vocabulary, self.settings.max_context_tokens
        num_new = asked.num_new_tokens
        if len(prompts) > MAX_PROMPTS:
            raise UserError(
                f"{len(prompts)} prompts are more than the {MAX_PROMPTS} that one request may hold."
            )
        if not all(prompts):
            raise UserError("a prompt has no tokens; give every prompt some text.")
        if (largest := max(map(max, prompts))) >= vocabulary:
            raise UserError(
                f"token id {largest} is out of the model's vocabulary of {vocabulary} tokens."
            )
        if (longest := max(map(len, prompts))) + num_new > context:
            raise UserError(
                f"a prompt of {longest} tokens and max_tokens {num_new} are more than the context "
                f"of {context} tokens."
            )
        num_logprobs = sum(len(prompt) + num_new for prompt in prompts) * (1 + asked.num_top)
        if num_logprobs > MAX_LOGPROBS_PER_ANSWER:
            raise UserError(
                f"the answer would hold up to {num_logprobs} log-probs, more than "
                f"{MAX_LOGPROBS_PER_ANSWER}; "
                "send fewer prompts at once, or ask for fewer log-probs at each position."
            )
        return num_logprobs

    async def _texts(
        self, asked: CompletionRequest, prompts: Sequence[list[int]]
    ) -> list[ScoredText]:
        try:
            return await self._scored(asked, prompts)
        except (RuntimeError, ValueError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise HTTPException(500, f"the model could not compute this: {reason}") from error

    async def _scored(
        self, asked: CompletionRequest, prompts: Sequence[list[int]]
    ) -> list[ScoredText]:
        completions = await self._generate(asked, prompts)
        # The sampler's own log-probs are at its temperature: those at another one, and top tokens,
        # take a scoring pass.
        sampled_at = asked.temperature or 1.0
        rescored = bool(asked.logprobs) or (
            asked.logprobs is not None and sampled_at != asked.told_temperature
        )
        if not (rescored or asked.prompt_is_scored):
            return [_scored_text(p, c, None) for p, c in zip(prompts, completions, strict=True)]
        texts = [
            [*p, *c.token_ids] if rescored else p for p, c in zip(prompts, completions, strict=True)
        ]
        scores = await asyncio.gather(
            *(self._done(ScoreJob(t, asked.num_top, asked.told_temperature)) for t in texts)
        )
        return [_scored_text(p, c, s) for p, c, s in zip(prompts, completions, scores, strict=True)]

    async def _generate(
        self, asked: CompletionRequest, prompts: Sequence[list[int]]
    ) -> list[Completion]:
        if not asked.num_new_tokens:
            return [Completion((), (), is_truncated=True)] * len(prompts)
        seed = secrets.randbits(62) if asked.seed is None else asked.seed
        temperature = 1.0 if asked.temperature is None else asked.temperature
        return await self._done(GenerateJob(prompts, asked.num_new_tokens, temperature, seed))

    async def _done(self, job: Job) -> Any:
        self.worker.submit(job)
        try:
            return await asyncio.wrap_future(
                job.done
            )  # cancelling it takes the job out of the queue
        except asyncio.CancelledError:
            job.is_given_up.set()  # and this ends it where it has begun
            raise

    async def _unless_gone(self, request: Request, work: Coroutine[Any, Any, Result]) -> Result:
        """The result of `work`, which is given up when the client has gone: it may have sent its
        request again."""
        task = asyncio.create_task(work)
        while not (await asyncio.wait({task}, timeout=_SECONDS_BETWEEN_LOOKS))[0]:
            if await request.is_disconnected() and task.cancel():
                raise HTTPException(499, "the client has gone.")
        return task.result()


def _scored_text(
    prompt: Sequence[int], completion: Completion, scores: TokenScores | None
) -> ScoredText:
    """Splits the scores of prompt and completion, where the completion was scored too."""
    own = TokenScores(torch.tensor(completion.logprobs))
    if scores is None:
        return ScoredText(prompt, completion, None, own)
    end = len(prompt) - 1
    was_scored = len(scores.logprobs) > end
    return ScoredText(
        prompt, completion, scores.part(0, end), scores.part(end, None) if was_scored else own
    )
