"""What a privileged teacher is shown besides the question: the section `[teacher.context]`. Imports
no torch."""

from collections.abc import Iterator
from typing import Literal

from rlad.config.types import Count, NonNegativeInt, Number, Section


class ContextTexts(Section):
    """The words around what the teacher is shown; an empty heading is left out."""

    answer: str = "The correct answer:"
    """heading of the reference answer"""
    first_success: str = "A correct solution:"
    """heading of the first correct solution"""
    next_success: str = "Another correct solution:"
    """heading of each further one"""
    failure: str = "A wrong attempt, not to be repeated:"
    """heading of each wrong attempt"""
    feedback: str = "Feedback on an earlier wrong attempt:"
    """heading of the verifier's feedback"""
    request: str = "Now solve the question that was asked first."
    """the end of the prompt"""


class ContextConfig(Section):
    """What the teacher is shown besides the question, in blocks, in place of `template`."""

    answer: bool = False
    """the reference answer"""
    fields: tuple[str, ...] = ()
    """entries of the problem's metadata, such as ["hint"] or ["skill"]"""
    num_successes: NonNegativeInt = 0
    """most correct completions of other rollouts of the group"""
    num_failures: NonNegativeInt = 0
    """most wrong ones"""
    feedback: bool = False
    """what the verifier says of the completion itself, where that is wrong and no correct one is
    shown"""
    choice: Literal["first", "random"] = "first"
    """which of them: the first ones of the group, or drawn for each completion"""
    success_reward: Number = 1.0
    """a completion is correct with at least this reward"""
    failure_reward: Number | None = None
    """a completion is wrong with at most this reward; by default, if it is not correct"""
    without_success: Literal["silent", "plain", "failures"] = "silent"
    """where a correct completion is wanted and there is none, and nothing else to be shown: the
    teacher says nothing, is asked after the student's prompt, or is shown wrong ones alone"""
    max_prompt_tokens: Count | None = None
    """longest prompt with all that is shown; by default what the completion leaves of the teacher's
    context"""
    show_thoughts: bool = False
    """show completions with their thoughts, `<think>` to `</think>`"""
    texts: ContextTexts = ContextTexts()

    @property
    def num_peers(self) -> int:
        """The most completions of the group that are shown."""
        return self.num_successes + self.num_failures

    @property
    def needs_group(self) -> bool:
        """Whether it shows something of the group's rollouts: their texts, or feedback."""
        return self.num_peers > 0 or self.feedback

    def problems(self) -> Iterator[str]:
        if not (self.answer or self.fields or self.num_peers or self.feedback):
            yield (
                "it shows nothing; set num_successes, num_failures, answer, fields or feedback, or "
                "leave the section out"
            )
        if self.failure_reward is not None and self.failure_reward >= self.success_reward:
            yield (
                f"failure_reward {self.failure_reward} is not below success_reward "
                f"{self.success_reward}, so a completion could be both; lower it"
            )
        if self.without_success == "failures" and not self.num_failures:
            yield "without_success = 'failures' shows none with num_failures = 0; set it to 1"
