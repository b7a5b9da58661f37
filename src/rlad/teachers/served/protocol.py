"""Requests to score or write given token ids, and the reading of a server's answers.

A `seed` is never sent: several seeded requests at once crash the engine of vLLM on the CPU.
"""

import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Base64Bytes, BaseModel, BeforeValidator, Field, ValidationError

Scoring = Literal["prompt_logprob_token_ids", "prompt_logprobs", "echo"]
"""In the order in which `auto` tries them."""

LARGEST_LOGPROB = 1e-2
"""A little above 0, to allow for rounding."""
STAND_IN_FOR_MINUS_INFINITY = -9999.0
"""vLLM's value for -inf, since JSON has no infinity."""
ID_PREFIX = "token_id:"
FLOAT32_TABLE = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '<f4', 'fortran_order': False, "
    rb"'shape': \(([1-9]\d{0,8}), ([1-9]\d{0,8})\), \} *\n",
    re.DOTALL,
)
"""The header of a `.npy` file with rows and columns of little-endian float32."""


def finite_logprob(value: Any) -> float:
    """Return a finite log-prob, or NaN for anything else that an answer has in its place."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    return float(value) if STAND_IN_FOR_MINUS_INFINITY < value <= LARGEST_LOGPROB else math.nan


Logprob = Annotated[float, BeforeValidator(finite_logprob)]


# The parts of an answer that are read. Pydantic ignores other fields of servers here. A wrong type
# makes the whole answer unusable, and its tokens NaN.
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


class _Generated(BaseModel):
    prompt_token_id_logprobs: Base64Bytes


class _WrittenToken(BaseModel):
    token_id: int
    logprob: Logprob


class _WrittenTokens(BaseModel):
    content: list[_WrittenToken] = []


class _WrittenChoice(BaseModel):
    logprobs: _WrittenTokens | None = None


class _Written(BaseModel):
    choices: list[_WrittenChoice] = Field(min_length=1)


@dataclass(frozen=True, slots=True)
class TokenScore:
    """A server's score of one token of a text. The defaults mean that it gave nothing usable."""

    logprob: float = math.nan
    string: str = ""
    """the token's string as the server writes it"""
    likeliest: Mapping[str, float] = field(default_factory=dict)
    """token id -> log-prob, of the most likely tokens at this position, or of the requested ones;
    may include the token itself"""


def scoring_path(scoring: Scoring) -> str:
    return "/inference/v1/generate" if scoring == "prompt_logprob_token_ids" else "/completions"


def scoring_request(
    scoring: Scoring,
    model: str,
    tokens: Sequence[int],
    *,
    start: int = 1,
    temperature: float = 1.0,
    num_likeliest: int = 0,
    as_ids: bool = True,
    entries: Sequence[Sequence[int]] | None = None,
) -> dict[str, Any]:
    """Make the request for the log-prob of each given token from index `start` (at least 1) on, and
    for the most likely tokens at each position. Servers that cannot skip earlier tokens score them
    too.

    `entries` asks for these ids at each position instead, by `prompt_logprob_token_ids`.

    `temper_prompt_logprobs` is our own field for log-probs at the request's temperature; `rlad
    serve-teacher` knows it, other servers ignore it. With `as_ids` a server that would answer with
    the text of tokens is asked for their ids instead.
    """
    if scoring == "prompt_logprob_token_ids":
        # A table with a row for each token. Only given ids can be requested, so the first ids of
        # the text replace the most likely ones.
        by_default = [[t, *tokens[:num_likeliest]] for t in tokens[start:]]
        wanted = {
            "temperature": temperature,
            "max_tokens": 1,
            "prompt_logprob_token_ids": by_default if entries is None else entries,
            "prompt_logprob_start": start - 1,  # the position that predicts the first of them
        }
        return {"model": model, "token_ids": list(tokens), "sampling_params": wanted}
    body: dict[str, Any] = {"model": model, "prompt": list(tokens), "temperature": temperature}
    if temperature != 1:
        body["temper_prompt_logprobs"] = True
    if scoring == "prompt_logprobs":
        return body | {"max_tokens": 1, "prompt_logprobs": num_likeliest}
    # The older way: the server echoes the prompt with log-probs, as if it had written it.
    body |= {"max_tokens": 0, "echo": True, "logprobs": max(num_likeliest, 1)}
    return body | {"return_tokens_as_token_ids": True} if as_ids else body


def generation_request(model: str, prompt: Sequence[int], num_tokens: int) -> dict[str, Any]:
    """Make the request for the most likely continuation with its log-probs and token ids."""
    return {
        "model": model,
        "prompt": list(prompt),
        "temperature": 0.0,
        "max_tokens": num_tokens,
        "logprobs": 1,
        "return_tokens_as_token_ids": True,
    }


def read_scores(
    scoring: Scoring, answer: dict[str, Any], tokens: Sequence[int], *, start: int = 1
) -> list[TokenScore]:
    """Read the score of each of `tokens`; the first has no log-prob. `start` is the request's."""
    choice = _first_choice(answer)
    if scoring == "prompt_logprob_token_ids":
        entries = _entries_of_table(answer, tokens, start)
    elif scoring == "prompt_logprobs":
        entries = choice.prompt_logprobs or []
    else:
        entries = _entries_of_echo(choice.logprobs, tokens) if choice.logprobs else []
    # In an answer with another number of tokens, values cannot be assigned to tokens.
    if len(entries) != len(tokens):
        return [TokenScore()] * len(tokens)
    scores = [TokenScore()]
    for token, entry in zip(tokens[1:], entries[1:], strict=True):
        entry = entry or {}
        given = entry.get(str(token), _Entry())
        likeliest = {other: found.logprob for other, found in entry.items()}
        scores.append(TokenScore(given.logprob, given.decoded_token or "", likeliest))
    return scores


def _entries_of_table(
    answer: dict[str, Any], tokens: Sequence[int], start: int
) -> list[dict[str, _Entry] | None]:
    """Convert a table of scores to the form of `prompt_logprobs`: for each token, id -> entry."""
    rows = read_table(answer, len(tokens) - start)
    if rows is None:
        return []
    entries: list[dict[str, _Entry] | None] = [None] * start
    for token, row in zip(tokens[start:], rows, strict=True):
        ids = [token, *tokens[: len(row) - 1]]
        scores = zip(ids, row, strict=False)
        entries.append({str(scored): _Entry(logprob=value) for scored, value in scores})
    return entries


def read_table(answer: dict[str, Any], num_rows: int) -> list[tuple[float, ...]] | None:
    """Read the rows of a table of scores, as many as were requested; None if there is none."""
    try:
        content = _Generated.model_validate(answer).prompt_token_id_logprobs
    except ValidationError:
        return None
    # The table names no ids, so a row is assumed to belong to the token at its position; the
    # self-test has confirmed this. A table of another size is not used.
    header = FLOAT32_TABLE.match(content)
    height, width = map(int, header.groups()) if header else (0, 0)
    numbers = content[header.end() :] if header else b""
    if height != num_rows or len(numbers) != 4 * height * width:
        return None
    return list(struct.iter_unpack(f"<{width}f", numbers))


def _entries_of_echo(lists: _Logprobs, tokens: Sequence[int]) -> list[dict[str, _Entry] | None]:
    """Convert an echo's lists to the form of `prompt_logprobs`: for each token, id -> entry."""
    likeliest = lists.top_logprobs or [None] * len(tokens)
    if any(len(row) != len(tokens) for row in (lists.tokens, lists.token_logprobs, likeliest)):
        return []
    entries: list[dict[str, _Entry] | None] = []
    rows = zip(tokens, lists.tokens, lists.token_logprobs, likeliest, strict=True)
    for token, name, logprob, others in rows:
        entry = {
            other.removeprefix(ID_PREFIX): _Entry(logprob=value)
            for other, value in (others or {}).items()
        }
        entry[str(token)] = _Entry(logprob=logprob, decoded_token=name)
        # A token written as text is assumed to be the given one. An id must match, since numbers
        # about other tokens are worse than none.
        is_another = name.startswith(ID_PREFIX) and name != f"{ID_PREFIX}{token}"
        entries.append(None if is_another else entry)
    return entries


def read_generation(answer: dict[str, Any]) -> list[tuple[int, float]]:
    """Read id and log-prob of each token that a server wrote, up to the first without one."""
    lists = _first_choice(answer).logprobs
    written: list[tuple[int, float]] = []
    for name, value in zip(lists.tokens, lists.token_logprobs, strict=False) if lists else []:
        # No vocabulary needs more digits.
        found = re.fullmatch(ID_PREFIX + "([0-9]{1,18})", name)
        if found is None or math.isnan(value):
            break
        written.append((int(found[1]), value))
    return written


def read_token_ids(answer: dict[str, Any]) -> list[tuple[int, float]]:
    """Read id and log-prob of each token that a server wrote on its route for token ids."""
    try:
        lists = _Written.model_validate(answer).choices[0].logprobs
    except ValidationError:
        return []
    return [(one.token_id, one.logprob) for one in lists.content] if lists else []


def _first_choice(answer: dict[str, Any]) -> _Choice:
    try:
        return _Completion.model_validate(answer).choices[0]
    except ValidationError:
        return _Choice()
