"""The form of a completion request and its answer: the part of vLLM's that distillation needs."""

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rlad.errors import UserError


class CompletionRequest(BaseModel):
    """The supported settings. Any other could change the answer, and is refused."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    model: str
    prompt: list[Annotated[int, Field(ge=0)]] = Field(min_length=2)
    """token ids; with fewer than two there is no log-prob"""
    max_tokens: int = Field(default=16, ge=0)
    temperature: float = Field(default=1.0, ge=0, le=100, allow_inf_nan=False)
    prompt_logprobs: Annotated[int, Field(ge=0, le=64)] | None = None
    """number of most likely tokens to report at each given token, besides that token"""
    logprobs: Annotated[int, Field(ge=0, le=1)] | None = None
    """log-probs of the written tokens, each by its id"""
    return_tokens_as_token_ids: Literal[True] = True
    temper_prompt_logprobs: bool = False
    """report log-probs at `temperature`, instead of at temperature 1 as vLLM does"""

    @property
    def num_new_tokens(self) -> int:
        """The most tokens to write.

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
    """Read a request. Raises `UserError` if it is not one."""
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
    written = tokens[num_prompt:]
    choice: dict[str, Any] = {"index": 0, "text": "".join(map(text_of, written))}
    if asked.prompt_logprobs is not None:
        choice["prompt_logprobs"] = [None] + [
            {
                str(token): {"logprob": _number(value), "decoded_token": text_of(token)}
                for token, value in found.items()
            }
            for found in scores[1:num_prompt]
        ]
    if asked.logprobs is not None:
        values = zip(written, scores[num_prompt:], strict=True)
        choice["logprobs"] = {
            "tokens": [f"token_id:{token}" for token in written],
            "token_logprobs": [_number(found[token]) for token, found in values],
        }
    return choice


def _number(value: float) -> float | None:
    """Return null for NaN and infinity, which JSON does not have."""
    return value if math.isfinite(value) else None
