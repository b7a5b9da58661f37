"""The task interface: problems, and judgements of completions."""

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
"""key of a problem's metadata for its whole reference solution, if it has one"""


@dataclass(frozen=True, slots=True)
class Problem:
    """A question of a task.

    `key` decides the split. Problems with the same key are always in the same split, so a task that
    gives equal keys to equivalent problems cannot leak held-out ones into training. `difficulty`
    labels the problem in evaluation tables (for example the number of people). `task` names its
    task if a run has several, and is empty otherwise. `messages` is the conversation that the model
    answers; it is empty if `prompt` is the only message. With messages, `prompt` shows them as
    text.
    """

    prompt: str
    answer: str
    key: str
    difficulty: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)
    task: str = ""
    messages: Conversation = ()
    images: tuple[Picture, ...] = ()
    """pictures in the order of their markers `<image>` in the text; without markers they come
    first"""

    @property
    def asked(self) -> str | Conversation:
        """The conversation that the model answers, or the user's only message."""
        return self.messages or self.prompt

    @property
    def question(self) -> str:
        """The user's last message."""
        return self.messages[-1][1] if self.messages else self.prompt


@dataclass(frozen=True, slots=True)
class Judgement:
    """A verdict and its reward. `reward` is NaN if the verifier cannot judge.

    `feedback` may say what is wrong with a wrong completion, never what would be right. A
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
    """Add feedback to the judgement of a wrong completion."""
    if judgement.verdict is not Verdict.WRONG:
        return judgement
    return replace(judgement, feedback=feedback[:MAX_FEEDBACK_CHARACTERS])


def cannot_judge(reason: str) -> Judgement:
    """Make a judgement without a verdict. The reward is NaN; `reason` says briefly what failed."""
    return Judgement(Verdict.CANNOT_JUDGE, math.nan, reason)


class Task(Protocol):
    """A source of problems with a verifier.

    Rewards are within its attribute `reward_range`, (least, greatest), or within `UNIT_RANGE` if it
    has none.
    """

    name: str

    def problem(self, split: Split, index: int, *, seed: int = 0) -> Problem:
        """Return problem number `index` of a split, in an order that `seed` fixes.

        It depends only on its arguments, so that a run can resume at any index without state.
        Procedural tasks have a problem for every index. Finite tasks start again, in another order,
        after `num_problems(split)`.
        """
        ...

    def num_problems(self, split: Split) -> int | None:
        """Count the different problems of the split; None if there is no limit."""
        return None

    def judge(self, problem: Problem, completion: str) -> Judgement:
        """Grade one completion. It never raises or hangs on any text."""
        ...

    def close(self) -> None:
        """Release the verifier's resources (worker processes)."""


def judge_completion(task: Task, problem: Problem, text: str, *, is_truncated: bool) -> Judgement:
    """Grade a sampled completion. If it is truncated, an answer at its end that may be incomplete
    does not count."""
    return task.judge(problem, without_cut_ending(text) if is_truncated else text)


def reward_range(task: Task) -> tuple[float, float]:
    return getattr(task, "reward_range", UNIT_RANGE)


class Graded(Protocol):
    """An object with a verdict and a reward."""

    @property
    def verdict(self) -> str: ...

    @property
    def reward(self) -> float: ...


def require_reward_in_range(task: Task, judgement: Graded, problem: str) -> None:
    """Raise `RunFailedError` if the reward of a judged completion is not a finite number in the
    task's range."""
    low, high = reward_range(task)
    if judgement.verdict != Verdict.CANNOT_JUDGE and not low <= judgement.reward <= high:
        raise RunFailedError(
            f"the verifier of the task {task.name} gave reward {judgement.reward} for {problem}, "
            f"but its rewards must be between {low:g} and {high:g}; fix the verifier, then "
            "continue with --resume."
        )


def split_of(key: str) -> Split:
    """Return the split of a problem, by its key only (10 % validation, 10 % test, 80 % train)."""
    # By a hash instead of a draw, added problems move no other problem into another split.
    bucket = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % 10_000
    if bucket < 1_000:
        return "validation"
    return "test" if bucket < 2_000 else "train"


def text_key(text: str) -> str:
    """Hash a text. Texts that differ only in case, white space or Unicode compatibility forms have
    the same hash."""
    normalised = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return hashlib.sha256(normalised.encode(errors="replace")).hexdigest()[:16]
