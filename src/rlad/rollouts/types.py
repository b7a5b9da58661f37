"""Completions, rollouts and groups: what the sampler returns, the verifier grades and the run
directory stores."""

import math
from dataclasses import asdict, dataclass
from typing import Any, Self


@dataclass(frozen=True, slots=True)
class Completion:
    """Sampled tokens (the end token included) and their log-probs under the sampler.

    `logprobs` are float32 values after division by the sampling temperature. `is_truncated` says
    that the token limit was reached before an end token.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    is_truncated: bool


@dataclass(frozen=True, slots=True)
class Rollout:
    """A completion with its text and its grade. `verdict` is `correct`, `wrong` or `cannot_judge`.

    `reward` is NaN when the verifier could not judge; such a rollout is left out of the group and
    trains nothing.
    """

    completion: Completion
    text: str
    verdict: str
    reward: float


@dataclass(frozen=True, slots=True)
class RolloutGroup:
    """All rollouts of one prompt."""

    problem_index: int
    prompt: str
    prompt_token_ids: tuple[int, ...]
    rollouts: tuple[Rollout, ...]

    def to_json(self) -> dict[str, Any]:
        row = asdict(self)
        for rollout in row["rollouts"]:
            rollout["reward"] = (
                None if math.isnan(rollout["reward"]) else rollout["reward"]
            )  # JSON has no NaN
        return row

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Self:
        rollouts = tuple(
            Rollout(
                completion=Completion(
                    token_ids=tuple(r["completion"]["token_ids"]),
                    logprobs=tuple(r["completion"]["logprobs"]),
                    is_truncated=r["completion"]["is_truncated"],
                ),
                text=r["text"],
                verdict=r["verdict"],
                reward=math.nan if r["reward"] is None else r["reward"],
            )
            for r in row["rollouts"]
        )
        return cls(row["problem_index"], row["prompt"], tuple(row["prompt_token_ids"]), rollouts)


Metrics = dict[str, float]
