"""Teachers: what gives one log-prob for each sampled token, and their table."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class Teacher(Protocol):
    """Scores the student's completions. One number per token is all that it is ever asked for."""

    identity: str
    """names the weights; a resumed run must find the same"""

    def logprobs(self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> list[Tensor]:
        """Log-probs of each completion's tokens, float32 `[its length]` on the CPU, at the sampling temperature.

        A token that cannot be scored is NaN, never 0: the loss drops and counts it.
        """
        ...


@dataclass(frozen=True, slots=True)
class TeacherType:
    """One row of the table."""

    location: str
    """`module:class`, imported when it is asked for"""
    summary: str


TEACHERS: dict[str, TeacherType] = {
    "local": TeacherType("rlad.teachers.local:LocalTeacher", "a transformers model in this process, frozen"),
}
