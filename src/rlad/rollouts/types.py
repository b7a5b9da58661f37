"""Completions, rollouts and groups, which the sampler returns, the verifier grades and the run
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
"""How an episode ended: by the environment, at a limit, or because the environment failed."""
_OF_EPISODES = ("actions", "ending")


@dataclass(frozen=True, slots=True)
class Completion:
    """Sampled tokens (the end token included) and their log-probs under the sampler.

    `logprobs` are float32 values at the sampling temperature. `is_truncated` means that the token
    limit was reached before an end token. The completion of an episode is everything after its
    prompt, including the environment's texts.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """0 where the environment wrote"""
    is_truncated: bool
    actions: tuple[bool, ...] | None = None
    """True for tokens that the model wrote; None: all of them"""
    ending: Ending | None = None
    """how an episode ended; None for a single turn"""

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
    """A turn of an episode: the model's text, and the environment's response."""

    text: str
    reply: str
    reward: float


@dataclass(frozen=True, slots=True)
class Asked:
    """A problem and its prompt in tokens, with its name for messages."""

    problem: Problem
    name: str
    prompt: Sequence[int]


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of a call that continues episodes: their indices among all episodes, and the most
    tokens of each."""

    num_all: int
    numbers: Sequence[int]
    """indices among all episodes; each episode has its own random numbers"""
    max_tokens: Sequence[int]


class Sampler(ABC):
    """A sampler of completions from one model, whose weights may change.

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
        """The most tokens of a prompt with its completion, if the sampler has its own limit."""
        return None

    def weights_changed(self) -> None:
        """Note that the model was updated: the next samples need its new weights."""
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
        """Start sampling, with the current weights, what the next `sample` with the same arguments
        returns. Samplers in this process do not support it."""
        return

    def has_begun(self, prompts: Sequence[Sequence[int]], seed: int) -> bool:
        """Return whether sampling completions of these prompts has begun."""
        return False

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Keep its weights and cache ready between several calls of `sample`."""
        yield

    def close(self) -> None:
        """Release its resources."""
        return


@dataclass(frozen=True, slots=True)
class Rollout:
    """A completion with its text and its grade. `verdict` is `correct`, `wrong` or `cannot_judge`.

    `reward` is NaN if the verifier could not judge; such a rollout is left out of the group and is
    not trained on. `reason` says why it could not; it is not stored. `feedback` is the verifier's
    comment on a wrong completion, if any.
    """

    completion: Completion
    text: str
    verdict: str
    reward: float
    reason: str = field(default="", compare=False)
    feedback: str = ""
    turns: tuple[Turn, ...] = ()
    """turns of an episode"""


@dataclass(frozen=True, slots=True)
class RolloutGroup:
    """All rollouts of one problem. `problem_index` is the problem's index in its split."""

    problem_index: int
    problem: Problem
    prompt_token_ids: tuple[int, ...]
    rollouts: tuple[Rollout, ...]
    skill: str = ""
    """the skill from earlier episodes that a teacher is shown, if any"""

    @property
    def prompt(self) -> str:
        return self.problem.prompt

    def to_json(self) -> dict[str, Any]:
        """Return what is stored of a group; of the problem, only its index and prompt."""
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
