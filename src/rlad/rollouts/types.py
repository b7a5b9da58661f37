"""Completions, rollouts and groups: what the sampler returns, the verifier grades and the run
directory stores."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal, Self

from rlad.models.pictures import with_pictures
from rlad.tasks import Problem

Ending = Literal["done", "turns", "tokens", "context", "failed"]
"""of an episode: by the environment, or by a limit, or by an environment that failed"""
_OF_EPISODES = ("actions", "ending")


@dataclass(frozen=True, slots=True)
class Completion:
    """Sampled tokens (the end token included) and their log-probs under the sampler.

    `logprobs` are float32 values after division by the sampling temperature. `is_truncated` says
    that the token limit was reached before an end token. That of an episode is all that comes after
    its prompt, the environment's texts too.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """0 where the environment wrote"""
    is_truncated: bool
    actions: tuple[bool, ...] | None = None
    """which tokens the model wrote; None: all of them"""
    ending: Ending | None = None
    """how an episode ended; None for a single answer"""

    @property
    def num_actions(self) -> int:
        """Count the tokens that the model wrote."""
        return len(self.token_ids) if self.actions is None else sum(self.actions)

    def to_json(self) -> dict[str, Any]:
        row = asdict(self)
        return row if self.ending else {k: v for k, v in row.items() if k not in _OF_EPISODES}

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Self:
        actions = row.get("actions")
        return cls(
            tuple(row["token_ids"]),
            tuple(row["logprobs"]),
            row["is_truncated"],
            None if actions is None else tuple(actions),
            row.get("ending"),
        )


@dataclass(frozen=True, slots=True)
class Turn:
    """A turn of an episode: what the model said, and what the environment made of it."""

    text: str
    reply: str
    reward: float


@dataclass(frozen=True, slots=True)
class Asked:
    """A problem and its prompt in tokens; messages call it by its name."""

    problem: Problem
    name: str
    prompt: Sequence[int]


@dataclass(frozen=True, slots=True)
class Rows:
    """Of a call that continues episodes: which of all of them its rows are, and how far each may
    go."""

    num_all: int
    numbers: Sequence[int]
    """of all episodes; each has random numbers of its own"""
    max_tokens: Sequence[int]


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
        rows: Rows | None = None,
        kept: Any = None,
    ) -> list[list[Completion]]:
        """Sample `group_size` completions of each prompt (token ids).

        `rlad.rollouts.sampling.sample` documents the arguments.
        """
        ...

    @property
    def max_tokens(self) -> int | None:
        """The most tokens of a prompt with its completion, where it has a limit of its own."""
        return None

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

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Keep what it computes with between several calls of `sample`."""
        yield

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
    turns: tuple[Turn, ...] = ()
    """of an episode"""


@dataclass(frozen=True, slots=True)
class RolloutGroup:
    """All rollouts of one problem. `problem_index` is its number in the split that it is from."""

    problem_index: int
    problem: Problem
    prompt_token_ids: tuple[int, ...]
    rollouts: tuple[Rollout, ...]
    skill: str = ""
    """what a teacher is shown of earlier episodes, if anything"""

    @property
    def prompt(self) -> str:
        return self.problem.prompt

    def to_json(self) -> dict[str, Any]:
        """What is stored of a group; of the problem its index and its prompt."""
        rollouts = [
            {
                "completion": rollout.completion.to_json(),
                "text": rollout.text,
                "verdict": rollout.verdict,
                # JSON has no NaN.
                "reward": None if math.isnan(rollout.reward) else rollout.reward,
                **({"feedback": rollout.feedback} if rollout.feedback else {}),
                **({"turns": [asdict(turn) for turn in rollout.turns]} if rollout.turns else {}),
            }
            for rollout in self.rollouts
        ]
        return {
            "problem_index": self.problem_index,
            "prompt": self.prompt,
            "prompt_token_ids": list(self.prompt_token_ids),
            "rollouts": rollouts,
            **({"skill": self.skill} if self.skill else {}),
        }

    @classmethod
    def from_json(cls, row: dict[str, Any], problem: Problem) -> Self:
        rollouts = tuple(
            Rollout(
                completion=Completion.from_json(r["completion"]),
                text=r["text"],
                verdict=r["verdict"],
                reward=math.nan if r["reward"] is None else r["reward"],
                feedback=r.get("feedback", ""),
                turns=tuple(Turn(**turn) for turn in r.get("turns", ())),
            )
            for r in row["rollouts"]
        )
        ids = with_pictures(row["prompt_token_ids"], problem.images)
        return cls(row["problem_index"], problem, ids, rollouts, row.get("skill", ""))


Metrics = dict[str, float]
