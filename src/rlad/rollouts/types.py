"""Completions, rollouts and groups: what the sampler returns, the verifier grades and the run
directory stores."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Self

from rlad.tasks import Problem


@dataclass(frozen=True, slots=True)
class Completion:
    """Sampled tokens (the end token included) and their log-probs under the sampler.

    `logprobs` are float32 values after division by the sampling temperature. `is_truncated` says
    that the token limit was reached before an end token.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    is_truncated: bool


class Sampler(ABC):
    """Writes completions of prompts under one model, whose weights may move.

    Our own decoder is `rlad.rollouts.sampling`, vLLM in this process `rlad.rollouts.vllm_sampler`,
    on servers `rlad.rollouts.vllm_server`.
    """

    name: ClassVar[str]
    is_trainers_own: ClassVar[bool]
    """whether it computes with the trainer's own model, so that its policy is the old policy"""
    description: str
    """what it is and, where `auto` has chosen it, why"""

    @abstractmethod
    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        group_size: int,
        max_completion_tokens: int,
        temperature: float,
        seed: int,
        before_token: Callable[[], None] = lambda: None,
        after_group: Callable[[int, list[Completion]], None] = lambda number, completions: None,
    ) -> list[list[Completion]]:
        """Sample `group_size` completions of each prompt (token ids).

        `rlad.rollouts.sampling.sample` documents the arguments.
        """
        ...

    def weights_changed(self) -> None:
        """Remember that the model has moved: what is sampled next needs its new weights."""
        return

    def update_weights(self) -> None:
        """Take over the weights of the model, if they have changed."""
        return

    def begin(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        group_size: int,
        max_completion_tokens: int,
        temperature: float,
        seed: int,
        before_token: Callable[[], None] = lambda: None,
    ) -> None:
        """Begin to write, under the weights of now, what the next `sample` with the same arguments
        returns. A sampler in this process cannot."""
        return

    def has_begun(self, prompts: Sequence[Sequence[int]], seed: int) -> bool:
        """Whether completions of these prompts have been begun."""
        return False

    def close(self) -> None:
        """Release what it holds."""
        return


@dataclass(frozen=True, slots=True)
class Rollout:
    """A completion with its text and its grade. `verdict` is `correct`, `wrong` or `cannot_judge`.

    `reward` is NaN when the verifier could not judge; such a rollout is left out of the group and
    trains nothing. `reason` is why it could not; it is not stored. `feedback` is what the verifier
    says of a wrong completion, if anything.
    """

    completion: Completion
    text: str
    verdict: str
    reward: float
    reason: str = field(default="", compare=False)
    feedback: str = ""


@dataclass(frozen=True, slots=True)
class RolloutGroup:
    """All rollouts of one problem. `problem_index` is its number in the split that it is from."""

    problem_index: int
    problem: Problem
    prompt_token_ids: tuple[int, ...]
    rollouts: tuple[Rollout, ...]

    @property
    def prompt(self) -> str:
        return self.problem.prompt

    def to_json(self) -> dict[str, Any]:
        """What is stored of a group; of the problem its index and its prompt."""
        rollouts = [
            {
                "completion": asdict(rollout.completion),
                "text": rollout.text,
                "verdict": rollout.verdict,
                # JSON has no NaN.
                "reward": None if math.isnan(rollout.reward) else rollout.reward,
                **({"feedback": rollout.feedback} if rollout.feedback else {}),
            }
            for rollout in self.rollouts
        ]
        return {
            "problem_index": self.problem_index,
            "prompt": self.prompt,
            "prompt_token_ids": list(self.prompt_token_ids),
            "rollouts": rollouts,
        }

    @classmethod
    def from_json(cls, row: dict[str, Any], problem: Problem) -> Self:
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
                feedback=r.get("feedback", ""),
            )
            for r in row["rollouts"]
        )
        return cls(row["problem_index"], problem, tuple(row["prompt_token_ids"]), rollouts)


Metrics = dict[str, float]
