"""Tasks: problems, and a judge of completions."""

import hashlib
import math
import unicodedata
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Literal, Protocol, TypeAlias, get_args

from rlad.errors import RunFailedError
from rlad.models.pictures import Picture
from rlad.tasks.answers import without_cut_ending

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
Conversation: TypeAlias = tuple[tuple[str, str], ...]
"""(role, content) of each message, the user's last"""

UNIT_RANGE = (0.0, 1.0)
MAX_FEEDBACK_CHARACTERS = 2_000


class Verdict(StrEnum):
    CORRECT = "correct"
    WRONG = "wrong"
    CANNOT_JUDGE = "cannot_judge"


SOLUTION = "solution"
"""the entry of a problem's metadata with its whole reference solution, where it has one"""


@dataclass(frozen=True, slots=True)
class Problem:
    """A question of a task.

    `key` decides the split: problems with the same key always fall into the same split, so a task
    that gives equal keys to equivalent problems cannot leak held-out ones into training.
    `difficulty` labels the problem in evaluation tables (for example the number of people). `task`
    names its task among the several of a run; it is empty where a run has one. `messages` is the
    conversation that the model answers; empty where `prompt` is all that the user says. With one,
    `prompt` is how it is shown.
    """

    prompt: str
    answer: str
    key: str
    difficulty: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)
    task: str = ""
    messages: Conversation = ()
    images: tuple[Picture, ...] = ()
    """in the order of their markers `<image>` in the text; without any they come first"""

    @property
    def asked(self) -> str | Conversation:
        """The conversation that the model is given, or the user's one message."""
        return self.messages or self.prompt

    @property
    def question(self) -> str:
        """The user's last message."""
        return self.messages[-1][1] if self.messages else self.prompt


@dataclass(frozen=True, slots=True)
class Judgement:
    """A verdict and the reward that goes with it. `reward` is NaN when the verifier cannot judge.

    `feedback` may say of a wrong completion what is wrong with it, never what would be right: a
    privileged teacher can be shown it.
    """

    verdict: Verdict
    reward: float
    reason: str = ""
    feedback: str = ""


def judged(is_correct: bool) -> Judgement:
    """Judge as correct with reward 1, or as wrong with reward 0."""
    return Judgement(Verdict.CORRECT, 1.0) if is_correct else Judgement(Verdict.WRONG, 0.0)


def with_feedback(judgement: Judgement, feedback: str) -> Judgement:
    """Add to the judgement of a wrong completion what is wrong with it."""
    if judgement.verdict is not Verdict.WRONG:
        return judgement
    return replace(judgement, feedback=feedback[:MAX_FEEDBACK_CHARACTERS])


def cannot_judge(reason: str) -> Judgement:
    """Judge without a verdict: the reward is NaN, `reason` says in a few words what went wrong."""
    return Judgement(Verdict.CANNOT_JUDGE, math.nan, reason)


class Task(Protocol):
    """A source of problems with a verifier.

    Rewards are within its attribute `reward_range`, (least, greatest), and within `UNIT_RANGE`
    where it has none.
    """

    name: str

    def problem(self, split: Split, index: int, *, seed: int = 0) -> Problem:
        """Return problem number `index` of a split, in an order that `seed` fixes.

        A function of its arguments alone, so that a run resumes at any index without state.
        Procedural tasks have a problem for every index; finite ones start again, in another order,
        after `num_problems(split)`.
        """
        ...

    def num_problems(self, split: Split) -> int | None:
        """Count the different problems of the split; None when they are generated without end."""
        return None

    def judge(self, problem: Problem, completion: str) -> Judgement:
        """Grade one completion. Never raises and never hangs on any text."""
        ...

    def close(self) -> None:
        """Release what the verifier holds (worker processes)."""


def judge_completion(task: Task, problem: Problem, text: str, *, is_truncated: bool) -> Judgement:
    """Grade what the sampler wrote; of a text that the token limit cut off, without an answer that
    it cuts."""
    return task.judge(problem, without_cut_ending(text) if is_truncated else text)


def reward_range(task: Task) -> tuple[float, float]:
    return getattr(task, "reward_range", UNIT_RANGE)


class Graded(Protocol):
    """What has a verdict and a reward."""

    @property
    def verdict(self) -> str: ...

    @property
    def reward(self) -> float: ...


def require_reward_in_range(task: Task, judgement: Graded, problem: str) -> None:
    """Raise `RunFailedError` for a judged completion whose reward is no finite number in the
    task's range."""
    low, high = reward_range(task)
    if judgement.verdict != Verdict.CANNOT_JUDGE and not low <= judgement.reward <= high:
        raise RunFailedError(
            f"the verifier of the task {task.name} gave reward {judgement.reward} for {problem}, "
            f"and its rewards must be between {low:g} and {high:g}; fix that verifier, then "
            "continue with --resume."
        )


def split_of(key: str) -> Split:
    """Choose the split of a problem by its key alone (10 % validation, 10 % test, 80 % train)."""
    # A hash, not a draw: adding problems moves no other problem into another split.
    bucket = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % 10_000
    if bucket < 1_000:
        return "validation"
    return "test" if bucket < 2_000 else "train"


def text_key(text: str) -> str:
    """Hash a text so that those that are equal up to case, white space and Unicode compatibility
    forms are equal."""
    normalised = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return hashlib.sha256(normalised.encode(errors="replace")).hexdigest()[:16]
