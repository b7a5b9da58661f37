"""The form of a completion request and of its answer: OpenAI's, with vLLM's `prompt_logprobs`."""

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rlad.errors import UserError

NumLikeliest = Annotated[int, Field(ge=0, le=64)]


class CompletionRequest(BaseModel):
    """The settings that are understood; any other could change the answer, and is refused."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    model: str
    prompt: list[Annotated[int, Field(ge=0)]] = Field(min_length=2)
    """token ids; of fewer than two no log-prob exists"""
    max_tokens: int = Field(16, ge=0)
    temperature: float = Field(1.0, ge=0, le=100, allow_inf_nan=False)
    prompt_logprobs: NumLikeliest | None = None
    logprobs: NumLikeliest | None = None
    echo: bool = False
    return_tokens_as_token_ids: bool = False
    temper_prompt_logprobs: bool = False
    """report log-probs at `temperature`, in place of the model's own, which are vLLM's"""

    @property
    def num_likeliest(self) -> int:
        """How many of the likeliest tokens to report at each position."""
        return max(self.prompt_logprobs or 0, self.logprobs or 0)

    @property
    def num_new_tokens(self) -> int:
        """How many tokens to write at most.

        vLLM always writes at least one. So a request for `prompt_logprobs` with one new token, and
        no log-prob of that token, asks for scores alone.
        """
        asks_for_scores_alone = self.prompt_logprobs is not None and self.logprobs is None
        return 0 if asks_for_scores_alone and self.max_tokens == 1 else self.max_tokens

    @property
    def score_temperature(self) -> float:
        """The temperature of the log-probs in the answer."""
        return (self.temperature or 1.0) if self.temper_prompt_logprobs else 1.0


def parse_request(body: bytes) -> CompletionRequest:
    """Read a request. `UserError` with one sentence where it is none."""
    try:
        return CompletionRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = str(first["loc"][0]) if first["loc"] else "the body"
        raise UserError(f"{where}: {first['msg'][0].lower()}{first['msg'][1:]}.") from None


def completion_choice(
    asked: CompletionRequest,
    tokens: Sequence[int],
    scores: Sequence[dict[int, float]],
    text_of: Callable[[int], str],
) -> dict[str, Any]:
    """Write the answer about the prompt with what was written after it.

    `scores` has the log-probs at each token: of the given one, and of the likeliest where they were
    asked for; nothing for the first token. `text_of` shows a token.
    """
    num_prompt = len(asked.prompt)
    start = 0 if asked.echo else num_prompt
    choice: dict[str, Any] = {"index": 0, "text": "".join(map(text_of, tokens[start:]))}
    if asked.prompt_logprobs is not None:
        choice["prompt_logprobs"] = [None] + [
            {
                str(token): {"logprob": _number(value), "decoded_token": text_of(token)}
                for token, value in found.items()
            }
            for found in scores[1:num_prompt]
        ]
    if asked.logprobs is not None:

        def name(token: int) -> str:
            return f"token_id:{token}" if asked.return_tokens_as_token_ids else text_of(token)

        rows = list(zip(tokens, scores, strict=True))[start:]
        choice["logprobs"] = {
            "tokens": [name(token) for token, _ in rows],
            "token_logprobs": [_number(found.get(token)) for token, found in rows],
            "top_logprobs": [
                {name(other): _number(value) for other, value in found.items()} or None
                for _, found in rows
            ],
        }
    return choice


def _number(value: float | None) -> float | None:
    """Return null for NaN and infinity, which JSON does not have."""
    return None if value is None or not math.isfinite(value) else value
