"""What a `/v1/completions` server is asked to score or write given token ids, and how its answers
are read.

A `seed` is never sent: several seeded requests at once end the engine of vLLM on the CPU.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, ValidationError

Scoring = Literal["prompt_logprobs", "echo"]

LARGEST_LOGPROB = 1e-2
"""a little above 0, for rounding"""
STAND_IN_FOR_MINUS_INFINITY = -9999.0
"""of vLLM, as JSON knows no infinity"""
BYTES_PER_TOKEN = 1024
BYTES_PER_ANSWER = 65_536


def _finite_logprob(value: Any) -> float:
    """Return a finite log-prob, or NaN for whatever else an answer holds in its place."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    return float(value) if STAND_IN_FOR_MINUS_INFINITY < value <= LARGEST_LOGPROB else math.nan


Logprob = Annotated[float, BeforeValidator(_finite_logprob)]


# What of an answer is read. Servers add fields of their own, which pydantic leaves out here; a
# wrong type makes the whole answer unusable, and its tokens NaN.
class _Entry(BaseModel):
    logprob: Logprob = math.nan
    decoded_token: str | None = None


class _Logprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[Logprob]
    top_logprobs: list[dict[str, Logprob] | None] | None = None


class _Choice(BaseModel):
    prompt_logprobs: list[dict[str, _Entry] | None] | None = None
    logprobs: _Logprobs | None = None


class _Completion(BaseModel):
    choices: list[_Choice] = Field(min_length=1)


@dataclass(frozen=True, slots=True)
class TokenScores:
    """What a server says of each token of a text, by position: NaN, nothing and "" where it says
    nothing that can be used."""

    logprobs: list[float]
    likeliest: list[dict[str, float]]
    """token, as the server writes it -> log-prob; may hold the given token too"""
    strings: list[str]
    """the given tokens as the server writes them"""


def max_answer_bytes(num_tokens: int, num_likeliest: int = 1) -> int:
    """Return far more bytes than an answer about so many tokens needs."""
    return BYTES_PER_ANSWER + BYTES_PER_TOKEN * num_tokens * (1 + num_likeliest)


def scoring_request(
    scoring: Scoring,
    model: str,
    tokens: Sequence[int],
    *,
    temperature: float = 1.0,
    num_likeliest: int = 0,
    as_ids: bool = True,
) -> dict[str, Any]:
    """Ask for the log-prob of each given token but the first, and for the likeliest tokens at each
    position.

    `temper_prompt_logprobs` is our own word for log-probs at the request's temperature; `rlad
    serve-teacher` knows it, other servers ignore it. With `as_ids` a server that answers with the
    text of tokens is asked for their ids instead.
    """
    body: dict[str, Any] = {"model": model, "prompt": list(tokens), "temperature": temperature}
    if temperature != 1:
        body["temper_prompt_logprobs"] = True
    if scoring == "prompt_logprobs":
        return body | {"max_tokens": 1, "prompt_logprobs": num_likeliest}
    # The older way: the server repeats the prompt as if it had written it, with log-probs.
    body |= {"max_tokens": 0, "echo": True, "logprobs": max(num_likeliest, 1)}
    return body | {"return_tokens_as_token_ids": True} if as_ids else body


def generation_request(model: str, prompt: Sequence[int], num_tokens: int) -> dict[str, Any]:
    """Ask for the likeliest continuation with its log-probs and token ids."""
    return {
        "model": model,
        "prompt": list(prompt),
        "temperature": 0.0,
        "max_tokens": num_tokens,
        "logprobs": 1,
        "return_tokens_as_token_ids": True,
    }


def read_scores(scoring: Scoring, answer: dict[str, Any], tokens: Sequence[int]) -> TokenScores:
    """Read the scores of `tokens`. In an answer about another number of tokens all are missing."""
    choice = _first_choice(answer)
    num_tokens = len(tokens)
    scores = TokenScores([math.nan] * num_tokens, [{}] * num_tokens, [""] * num_tokens)
    if scoring == "prompt_logprobs":
        _read_prompt_logprobs(choice.prompt_logprobs or [], tokens, scores)
    elif choice.logprobs is not None:
        _read_echo(choice.logprobs, tokens, scores)
    return scores


def _read_prompt_logprobs(
    entries: Sequence[dict[str, _Entry] | None], tokens: Sequence[int], scores: TokenScores
) -> None:
    """Read one entry per token, None for the first: token id -> log-prob and text."""
    if len(entries) != len(tokens):
        return
    for i in range(1, len(tokens)):
        entry = entries[i] or {}
        given = entry.get(str(tokens[i]), _Entry())
        scores.logprobs[i] = given.logprob
        scores.strings[i] = given.decoded_token or ""
        scores.likeliest[i] = {token: other.logprob for token, other in entry.items()}


def _read_echo(lists: _Logprobs, tokens: Sequence[int], scores: TokenScores) -> None:
    """Read lists over tokens. A token that is written as another id than the given one has no
    value; one that is written as text is taken on trust."""
    likeliest = lists.top_logprobs or [None] * len(tokens)
    if any(len(row) != len(tokens) for row in (lists.tokens, lists.token_logprobs, likeliest)):
        return
    for i in range(1, len(tokens)):
        name = lists.tokens[i]
        # Numbers about other tokens than ours are worse than none.
        if name.startswith("token_id:") and name != f"token_id:{tokens[i]}":
            continue
        scores.logprobs[i] = lists.token_logprobs[i]
        scores.strings[i] = name
        scores.likeliest[i] = likeliest[i] or {}


def read_generation(
    answer: dict[str, Any], ids_of_strings: Mapping[str, int]
) -> tuple[list[int], list[float]]:
    """Read ids and log-probs of what a server wrote, up to the first token that cannot be read.

    `ids_of_strings` is for servers that write tokens as text.
    """
    logprobs = _first_choice(answer).logprobs
    ids: list[int] = []
    values: list[float] = []
    if logprobs is None:
        return ids, values
    for name, value in zip(logprobs.tokens, logprobs.token_logprobs, strict=False):
        number = name.removeprefix("token_id:")
        is_id = number != name and number.isascii() and number.isdecimal() and len(number) < 19
        token = int(number) if is_id else ids_of_strings.get(name)
        if token is None or math.isnan(value):
            break
        ids.append(token)
        values.append(value)
    return ids, values


def _first_choice(answer: dict[str, Any]) -> _Choice:
    try:
        return _Completion.model_validate(answer).choices[0]
    except ValidationError:
        return _Choice()
