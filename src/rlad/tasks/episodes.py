"""Episodes: the environment interface, and the rules that turn steps into a verdict.

A problem is the initial state of an episode; the seed is for random events afterwards. All rollouts
of a group therefore begin with the same text, the problem's prompt.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rlad.tasks.base import Judgement, Problem, Task, Verdict, cannot_judge

MAX_REPLY_CHARACTERS = 100_000
_MAX_FEEDBACK_CHARACTERS = 2_000
RewardRule = Literal["sum", "last"]


class EpisodeFailed(Exception):
    """The error of an environment that gave no result. The message says briefly why. Only one
    rollout is lost."""


@dataclass(frozen=True, slots=True)
class Step:
    """The result of an environment for a turn of the model.

    Two entries of `info` are read: `success` (bool), which replaces the task's threshold on the
    reward, and `feedback` (text), what was wrong, for a privileged teacher.
    """

    text: str
    reward: float = 0.0
    done: bool = False
    info: Mapping[str, Any] = field(default_factory=dict)


class Environment(ABC):
    """The environment of a model's actions: one episode at a time, from `reset` to a step with
    `done`.

    Both methods may raise `EpisodeFailed`.
    """

    @abstractmethod
    def reset(self, problem: Problem, *, seed: int) -> str:
        """Begin an episode in the state of `problem`, and return its first text, which depends only
        on the problem. `seed` is for random events afterwards."""

    @abstractmethod
    def step(self, text: str) -> Step:
        """Apply the model's turn, and return its result."""

    def close(self) -> None:
        """Release all resources."""
        return


@dataclass(frozen=True, slots=True)
class EpisodeRules:
    """The rules by which a task's episodes are played and judged."""

    make: Callable[[], Environment]
    """makes an environment for one episode, which is closed afterwards"""
    max_turns: int = 10
    max_turn_tokens: int | None = None
    """most tokens of one turn of the model; None: what is left of the completion"""
    reward: RewardRule = "sum"
    """reward of an episode: the sum of its steps' rewards, or that of its last step"""
    success_reward: float = 1.0
    """least reward of a successful episode, unless the last step's info has `success`"""

    def judge(self, steps: Sequence[Step]) -> Judgement:
        """Judge an episode by its steps. An episode without steps cannot be judged."""
        if not steps:
            return cannot_judge("the episode ended before its first step")
        rewards = [step.reward for step in steps]
        reward = math.fsum(rewards) if self.reward == "sum" else rewards[-1]
        if not math.isfinite(reward):
            return cannot_judge(f"the reward of the episode is {reward}")
        info = steps[-1].info
        is_success = bool(info.get("success", reward >= self.success_reward))
        feedback = "" if is_success else str(info.get("feedback", ""))
        verdict = Verdict.CORRECT if is_success else Verdict.WRONG
        return Judgement(verdict, reward, feedback=feedback[:_MAX_FEEDBACK_CHARACTERS])


def episode_rules(task: Task) -> EpisodeRules | None:
    """Return the rules of a task with episodes; None for a task with single answers."""
    return getattr(task, "episode_rules", None)


def checked_text(value: Any) -> str:
    """Return an environment's text. Raises `EpisodeFailed` if it is not a text or is too long."""
    if not isinstance(value, str):
        raise EpisodeFailed(f"the environment returned {value!r:.80} for a text")
    if len(value) > MAX_REPLY_CHARACTERS:
        raise EpisodeFailed(
            f"the environment's text has {len(value)} characters, more than {MAX_REPLY_CHARACTERS}"
        )
    return value


def checked_step(value: Any) -> Step:
    """Make a `Step` from an environment's result: a `Step` or (text, reward, done, info). Raises
    `EpisodeFailed` for anything else."""
    parts: Any = value
    if isinstance(value, Step):
        parts = (value.text, value.reward, value.done, value.info)
    match parts:
        case (text, reward, done, Mapping() as info):
            pass
        case _:
            raise EpisodeFailed(
                f"the environment returned {value!r:.80}, not (text, reward, done, info)"
            )
    reward = reward.item() if hasattr(reward, "item") else reward  # scalars of numpy and torch
    done = done.item() if hasattr(done, "item") else done
    if not isinstance(reward, int | float) or not math.isfinite(reward):
        raise EpisodeFailed(f"the environment returned {reward!r:.80} for a reward")
    if not isinstance(done, bool):
        raise EpisodeFailed(f"the environment returned {done!r:.80} for `done`")
    return Step(checked_text(text), float(reward), done, dict(info))
