"""Episodes: what an environment is, and by which rules its steps become a verdict.

A problem is the initial state of an episode; the seed is for what happens at random afterwards. So
all rollouts of a group begin with the same text, which is the problem's prompt.
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
    """An environment that gave no result; the message says why in a few words. It costs one
    rollout."""


@dataclass(frozen=True, slots=True)
class Step:
    """What an environment returns for a turn of the model.

    Of `info` two entries are read: `success` (bool), in place of the task's threshold on the
    reward, and `feedback` (text), what was wrong, for a privileged teacher.
    """

    text: str
    reward: float = 0.0
    done: bool = False
    info: Mapping[str, Any] = field(default_factory=dict)


class Environment(ABC):
    """What a model acts in: one episode at a time, from `reset` to a step that is done.

    Both methods may raise `EpisodeFailed`.
    """

    @abstractmethod
    def reset(self, problem: Problem, *, seed: int) -> str:
        """Begin an episode in the state of `problem`, and return the first text: a function of the
        problem alone. `seed` is for what happens at random afterwards."""

    @abstractmethod
    def step(self, text: str) -> Step:
        """Take the model's turn, and return what comes of it."""

    def close(self) -> None:
        """Release what it holds."""
        return


@dataclass(frozen=True, slots=True)
class EpisodeRules:
    """How a task's episodes are played and judged."""

    make: Callable[[], Environment]
    """an environment for one episode, closed after it"""
    max_turns: int = 10
    max_turn_tokens: int | None = None
    """of one turn of the model; None: what is left of the completion"""
    reward: RewardRule = "sum"
    """of an episode: the sum of its steps' rewards, or that of its last step"""
    success_reward: float = 1.0
    """an episode with at least this reward is a success, unless its last step says `success`"""

    def judge(self, steps: Sequence[Step]) -> Judgement:
        """Judge an episode by its steps; without any it cannot be judged."""
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
    """Return the rules of a task whose problems are episodes; None for a task of single answers."""
    return getattr(task, "episode_rules", None)


def checked_text(value: Any) -> str:
    """Return what an environment gave for a text; `EpisodeFailed` where it is none, or too
    long."""
    if not isinstance(value, str):
        raise EpisodeFailed(f"the environment returned {value!r:.80} for a text")
    if len(value) > MAX_REPLY_CHARACTERS:
        raise EpisodeFailed(
            f"the environment's text has {len(value)} characters, more than {MAX_REPLY_CHARACTERS}"
        )
    return value


def checked_step(value: Any) -> Step:
    """Make a `Step` of what an environment returned: a `Step`, or (text, reward, done, info).
    `EpisodeFailed` where it is neither."""
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
