"""`/v1/completions` as OpenAI and vLLM write it: what a request may hold, and the form of the
answer."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from transformers import PreTrainedTokenizerBase

from rlad.errors import UserError
from rlad.rollouts.types import Completion
from rlad.serving.worker import TokenScores

MAX_CHARACTERS_PER_TOKEN = 100
"""longer texts are not even read by the tokenizer, which takes its time with them"""
MAX_TOP = 64
"""most tokens whose log-probs are told at one position"""

TokenId = Annotated[int, Field(ge=0)]
NumTop = Annotated[int, Field(ge=0, le=MAX_TOP)]


class CompletionRequest(BaseModel):
    """What is understood; of what would change the answer and is not, only the value that changes
    nothing is allowed."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    model: str
    prompt: str | list[str] | list[TokenId] | list[list[TokenId]] = Field(min_length=1)
    max_tokens: Annotated[int, Field(ge=0)] | None = 16
    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    logprobs: NumTop | None = None
    echo: bool | None = False
    prompt_logprobs: NumTop | None = None
    temper_prompt_logprobs: bool = False
    """also the log-probs told are those at `temperature`; otherwise they are the model's own, as
    vLLM's are"""
    return_tokens_as_token_ids: bool | None = False
    return_token_ids: bool | None = False
    add_special_tokens: bool = True
    """to prompts that are texts"""
    user: str | None = None

    n: Literal[1] | None = 1
    best_of: Literal[1] | None = 1
    stream: Literal[False] | None = False
    stop: Annotated[list[str], Field(max_length=0)] | None = None
    top_p: Literal[1] | None = 1
    top_k: Literal[-1, 0] | None = 0
    min_p: Literal[0] | None = 0
    presence_penalty: Literal[0] | None = 0
    frequency_penalty: Literal[0] | None = 0
    repetition_penalty: Literal[1] | None = 1
    skip_special_tokens: Literal[True] = True
    ignore_eos: Literal[False] = False

    @property
    def num_top(self) -> int:
        """How many of the most likely tokens are to be told at each position."""
        return max(self.prompt_logprobs or 0, self.logprobs or 0)

    @property
    def prompt_is_scored(self) -> bool:
        return self.prompt_logprobs is not None or (bool(self.echo) and self.logprobs is not None)

    @property
    def num_new_tokens(self) -> int:
        """How many tokens to generate at most.

        vLLM cannot be asked for fewer than one: a request for prompt log-probs and one token of
        which nothing is asked is about the prompt alone.
        """
        asks_of_it = self.logprobs is not None or self.return_token_ids
        is_about_prompt = (
            self.max_tokens == 1 and self.prompt_logprobs is not None and not asks_of_it
        )
        return 0 if is_about_prompt else self.max_tokens or 0

    @property
    def told_temperature(self) -> float:
        """Of the log-probs in the answer; greedy decoding (0) tells those at 1."""
        return (self.temperature or 1.0) if self.temper_prompt_logprobs else 1.0


def parse_request(body: bytes | bytearray) -> CompletionRequest:
    """`UserError` with one sentence when the body is none."""
    try:
        return CompletionRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = str(first["loc"][0]) if first["loc"] else "the body"
        if where == "prompt":
            raise UserError(
                "prompt must be a text, token ids, or a list of texts or of lists of token ids; "
                "none empty, no id negative."
            ) from None
        if first["type"] == "extra_forbidden":
            raise UserError(f"{where!r} is not understood by this server; leave it out.") from None
        raise UserError(f"{where}: {first['msg'][:1].lower()}{first['msg'][1:]}.") from None


def prompt_token_ids(
    request: CompletionRequest, tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> list[list[int]]:
    """The prompts of a request as token ids. `UserError` for a text that is far too long for so
    many tokens."""
    prompt: Any = request.prompt
    several: Any = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
    if not isinstance(several[0], str):
        return several
    if (longest := max(map(len, several))) > max_tokens * MAX_CHARACTERS_PER_TOKEN:
        raise UserError(
            f"a prompt of {longest} characters is far more than the context of {max_tokens} tokens."
        )
    return [
        tokenizer(text, add_special_tokens=request.add_special_tokens)["input_ids"]
        for text in several
    ]


@dataclass(frozen=True, slots=True)
class ScoredText:
    """A prompt with its completion. `prompt_scores` and `top_scores` are None unless asked for."""

    prompt: Sequence[int]
    completion: Completion
    prompt_scores: TokenScores | None
    completion_scores: TokenScores | None
    """log-probs, and top tokens where they were asked for, of the completion's tokens"""


class AnswerWriter:
    """Writes answers in vLLM's form."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self._text_of = lru_cache(maxsize=200_000)(lambda token: str(tokenizer.decode([token])))

    def text_of(self, token: int) -> str:
        return self._text_of(token)

    def choice(self, index: int, request: CompletionRequest, text: ScoredText) -> dict[str, Any]:
        generated = list(text.completion.token_ids)
        shown = [*text.prompt, *generated] if request.echo else generated
        choice: dict[str, Any] = {
            "index": index,
            "text": self.tokenizer.decode(shown, skip_special_tokens=True),
            "logprobs": None,
            "finish_reason": "length" if text.completion.is_truncated else "stop",
            "prompt_logprobs": None,
        }
        if request.prompt_logprobs is not None:
            choice["prompt_logprobs"] = self.prompt_logprobs(text, request.prompt_logprobs)
        if request.logprobs is not None:
            choice["logprobs"] = self.logprobs(request, text)
        if request.return_token_ids:
            choice |= {"prompt_token_ids": list(text.prompt), "token_ids": generated}
        return choice

    def prompt_logprobs(self, text: ScoredText, num_top: int) -> list[dict[str, Any] | None]:
        """One entry for each prompt token, None for the first: `{token id: {logprob, rank,
        decoded_token}}`."""
        assert text.prompt_scores is not None
        entries: list[dict[str, Any] | None] = [None]
        for token, (logprob, rank, top) in zip(
            text.prompt[1:], _rows(text.prompt_scores, num_top), strict=True
        ):
            entry = {
                str(token): {"logprob": logprob, "rank": rank, "decoded_token": self.text_of(token)}
            }
            for place, (other, value) in enumerate(top, start=1):
                entry.setdefault(
                    str(other),
                    {"logprob": value, "rank": place, "decoded_token": self.text_of(other)},
                )
            entries.append(entry)
        return entries

    def logprobs(self, request: CompletionRequest, text: ScoredText) -> dict[str, Any]:
        """OpenAI's lists, of the completion's tokens, and with `echo` of the prompt's before
        them."""
        assert request.logprobs is not None and text.completion_scores is not None
        name = _id_as_text if request.return_tokens_as_token_ids else self.text_of
        tokens, rows = (
            list(text.completion.token_ids),
            list(_rows(text.completion_scores, request.logprobs)),
        )
        if request.echo:
            assert text.prompt_scores is not None
            tokens = [*text.prompt, *tokens]
            rows = [(None, None, None), *_rows(text.prompt_scores, request.logprobs), *rows]
        names = [name(token) for token in tokens]
        top = [
            None
            if others is None
            else {name(token): logprob} | {name(other): value for other, value in others}
            for token, (logprob, _, others) in zip(tokens, rows, strict=True)
        ]
        offsets = [0]
        for each in names:
            offsets.append(offsets[-1] + len(each))
        return {
            "tokens": names,
            "token_logprobs": [logprob for logprob, _, _ in rows],
            "top_logprobs": top,
            "text_offset": offsets[:-1],
        }


def _id_as_text(token: int) -> str:
    return f"token_id:{token}"


def _rows(scores: TokenScores, num_top: int) -> Any:
    """`(log-prob, rank, [(token, log-prob), ...])` of each token."""
    logprobs = [_number(value) for value in scores.logprobs.tolist()]
    if scores.ranks is None or scores.top_ids is None or scores.top_logprobs is None:
        return ((logprob, None, []) for logprob in logprobs)
    tops = (
        [(token, _number(value)) for token, value in zip(ids, values, strict=True)]
        for ids, values in zip(
            scores.top_ids[:, :num_top].tolist(),
            scores.top_logprobs[:, :num_top].tolist(),
            strict=True,
        )
    )
    return zip(logprobs, scores.ranks.tolist(), tops, strict=True)


def _number(value: float) -> float | None:
    """JSON has neither NaN nor infinity: null, which no one can take for a log-prob."""
    return value if math.isfinite(value) else None
