"""What a `/v1/completions` server is asked to score or write given token ids, and how its answers
are read.

A `seed` is never sent: several seeded requests at once end the engine of vLLM on the CPU.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Scoring = Literal["prompt_logprobs", "echo"]

LARGEST_LOGPROB = 1e-2
"""a little above 0, for rounding"""
STAND_IN_FOR_MINUS_INFINITY = -9999.0
"""of vLLM, as JSON knows no infinity"""
BYTES_PER_TOKEN, BYTES_PER_ANSWER = 1024, 65_536
_TOKEN_AS_ID = re.compile(r"token_id:([0-9]{1,18})")


@dataclass(frozen=True, slots=True)
class TokenScores:
    """What a server says of each token of a text, by position: NaN, nothing and "" where it says
    nothing that can be used."""

    logprobs: list[float]
    likeliest: list[dict[str, float]]
    """token, as the server writes it -> log-prob; may hold the given token too"""
    strings: list[str]
    """the given tokens as the server writes them"""

    @classmethod
    def missing(cls, num_tokens: int) -> "TokenScores":
        return cls([math.nan] * num_tokens, [{}] * num_tokens, [""] * num_tokens)


def max_answer_bytes(num_tokens: int, num_likeliest: int = 1) -> int:
    """Far more than an answer about so many tokens needs."""
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
    """Asks for the log-prob of each given token but the first, and for the likeliest tokens at each
    position.

    `temper_prompt_logprobs` is our own word for log-probs at the request's temperature; `rlad
    serve-teacher` knows it, other servers pass it over. With `as_ids` a server that answers with
    the text of tokens is asked for their ids instead.
    """
    body: dict[str, Any] = {"model": model, "prompt": list(tokens), "temperature": temperature}
    if temperature != 1:
        body["temper_prompt_logprobs"] = True
    if scoring == "prompt_logprobs":
        return body | {"max_tokens": 1, "prompt_logprobs": num_likeliest}
    body |= {"max_tokens": 0, "echo": True, "logprobs": max(num_likeliest, 1)}
    return body | {"return_tokens_as_token_ids": True} if as_ids else body


def read_scores(scoring: Scoring, answer: dict[str, Any], tokens: Sequence[int]) -> TokenScores:
    """The scores of `tokens` in an answer; those of an answer about another number of tokens are
    all missing."""
    choice = _first_choice(answer)
    return (
        _read_prompt_logprobs(choice, tokens)
        if scoring == "prompt_logprobs"
        else _read_echo(choice, tokens)
    )


def generation_request(model: str, prompt: Sequence[int], num_tokens: int) -> dict[str, Any]:
    """Asks for the likeliest continuation with its log-probs and token ids."""
    return {
        "model": model,
        "prompt": list(prompt),
        "temperature": 0.0,
        "max_tokens": num_tokens,
        "logprobs": 1,
        "return_tokens_as_token_ids": True,
    }


def read_generation(
    answer: dict[str, Any], ids_of_strings: dict[str, int]
) -> tuple[list[int], list[float]]:
    """Ids and log-probs of what a server wrote, up to the first token that cannot be read.

    `ids_of_strings` is for servers that write tokens as text.
    """
    logprobs = _section(_first_choice(answer), "logprobs")
    ids: list[int] = []
    values: list[float] = []
    for string, value in zip(
        _list(logprobs, "tokens"), _list(logprobs, "token_logprobs"), strict=False
    ):
        as_id = _TOKEN_AS_ID.fullmatch(string) if isinstance(string, str) else None
        token = (
            int(as_id[1])
            if as_id
            else ids_of_strings.get(string)
            if isinstance(string, str)
            else None
        )
        if token is None or math.isnan(_logprob(value)):
            break
        ids.append(token)
        values.append(_logprob(value))
    return ids, values


def _read_prompt_logprobs(choice: dict[str, Any], tokens: Sequence[int]) -> TokenScores:
    """One entry per token, None for the first: token id -> {"logprob", "decoded_token"}."""
    entries = _list(choice, "prompt_logprobs")
    if len(entries) != len(tokens):
        return TokenScores.missing(len(tokens))
    scores = TokenScores.missing(len(tokens))
    for i, (entry, token) in enumerate(zip(entries, tokens, strict=True)):
        if i == 0 or not isinstance(entry, dict):
            continue
        found = {key: value for key, value in entry.items() if isinstance(value, dict)}
        given = found.get(str(token), {})
        scores.logprobs[i] = _logprob(given.get("logprob"))
        scores.likeliest[i] = {key: _logprob(value.get("logprob")) for key, value in found.items()}
        string = given.get("decoded_token")
        scores.strings[i] = string if isinstance(string, str) else ""
    return scores


def _read_echo(choice: dict[str, Any], tokens: Sequence[int]) -> TokenScores:
    """Lists over tokens. Where tokens are written as ids, another id than the given one has no
    value."""
    logprobs = _section(choice, "logprobs")
    values, strings, likeliest = (
        _list(logprobs, name) for name in ("token_logprobs", "tokens", "top_logprobs")
    )
    if len(values) != len(tokens):
        return TokenScores.missing(len(tokens))
    scores = TokenScores.missing(len(tokens))
    for i, token in enumerate(tokens):
        string = strings[i] if len(strings) == len(tokens) and isinstance(strings[i], str) else ""
        as_id = _TOKEN_AS_ID.fullmatch(string)
        if i == 0 or (as_id and int(as_id[1]) != token):
            continue
        scores.logprobs[i] = _logprob(values[i])
        scores.strings[i] = string
        if len(likeliest) == len(tokens) and isinstance(likeliest[i], dict):
            scores.likeliest[i] = {key: _logprob(value) for key, value in likeliest[i].items()}
    return scores


def _logprob(value: Any) -> float:
    """A finite log-prob, or NaN for whatever else stands there."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    return float(value) if STAND_IN_FOR_MINUS_INFINITY < value <= LARGEST_LOGPROB else math.nan


def _first_choice(answer: dict[str, Any]) -> dict[str, Any]:
    choices = _list(answer, "choices")
    return choices[0] if choices and isinstance(choices[0], dict) else {}


def _list(table: dict[str, Any], name: str) -> list[Any]:
    value = table.get(name)
    return value if isinstance(value, list) else []


def _section(table: dict[str, Any], name: str) -> dict[str, Any]:
    value = table.get(name)
    return value if isinstance(value, dict) else {}
