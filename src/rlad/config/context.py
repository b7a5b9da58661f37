"""What a privileged teacher is shown besides the question: the section `[teacher.context]`. Imports
no torch."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from rlad.config.addresses import ServerURL, VariableName
from rlad.config.types import (
    Count,
    Mark,
    NonNegative,
    NonNegativeInt,
    Number,
    Positive,
    Section,
)


class SkillEndpointConfig(Section):
    """The server whose model writes skills, by `/v1/chat/completions`."""

    urls: Annotated[tuple[ServerURL, ...], Field(min_length=1), Mark.NO_NUMBER]
    """such as `http://127.0.0.1:8000/v1`; several stand in for each other"""
    model: str
    """the name under which the server offers it"""
    max_tokens: Count = 512
    """of what it writes, thoughts included"""
    max_attempt_characters: Count = 8_000
    """of each attempt that it is shown, from its end"""
    api_key_variable: Annotated[VariableName, Mark.NO_NUMBER] = "RLAD_SUMMARISER_API_KEY"
    """environment variable with the server's key, if it asks for one"""
    timeout_seconds: Annotated[Positive, Mark.NO_NUMBER] = 120.0
    """for one request, from sending it to the end of its answer"""
    num_retries: Annotated[NonNegativeInt, Mark.NO_NUMBER] = 7
    """of a request that no server answered; with the default pause, 3 minutes pass until the run
    ends"""
    retry_pause_seconds: Annotated[Positive, Mark.NO_NUMBER] = 2.0
    """before the first retry; doubled by each one up to a minute, and spread randomly"""


class SkillConfig(Section):
    """The bank of skills of a run: what was learnt from earlier episodes, written down in three
    fields, of which the teacher is shown one."""

    per: Literal["task", "difficulty", "problem"] = "task"
    """what has a bank of its own: the whole task, each difficulty, or each problem (the paper; for
    tasks of few problems, which come again and again)"""
    exploration: NonNegative = 2**0.5
    """c of mean reward + c sqrt(ln N / n), by which a skill is chosen when all have been tried"""
    max_skills: Count = 20
    """of one bank; then a new one takes the place of the one with the lowest mean reward"""
    summariser: Literal["rules", "student", "teacher", "endpoint"] = "rules"
    """what writes them: a template that quotes the episodes, or a model that is shown them: the
    student, the local teacher, or that of an `endpoint`"""
    endpoint: SkillEndpointConfig | None = None
    """a model on an OpenAI-compatible server"""
    max_characters: Count = 400
    """of each of the three fields"""

    def problems(self) -> Iterator[str]:
        if self.summariser == "endpoint" and self.endpoint is None:
            yield (
                "summariser = 'endpoint' needs a section endpoint with urls and model; add it, or "
                "take 'rules'"
            )
        if self.summariser != "endpoint" and self.endpoint is not None:
            yield (
                f"it has an endpoint, and summariser is {self.summariser!r}; set it to 'endpoint', "
                "or leave the section out"
            )


class ContextTexts(Section):
    """The words around what the teacher is shown; an empty heading is left out."""

    answer: str = "The correct answer:"
    """heading of the reference answer"""
    solution: str = "A reference solution:"
    """heading of the reference solution"""
    first_success: str = "A correct solution:"
    """heading of the first correct solution"""
    skill: str = "What was learnt from earlier attempts at such tasks:"
    """heading of a skill"""
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
    solution: bool = False
    """the whole reference solution, in place of the answer: of problems of `jsonl` whose
    answer_format takes a part of the field, or that have a field `solution`"""
    fields: tuple[str, ...] = ()
    """entries of the problem's metadata, such as ["hint"] or ["skill"]"""
    skill: SkillConfig | None = None
    """a skill of the run's bank; without one yet, `without_success` says what happens"""
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
        """Whether it shows something of the group's rollouts: their texts, feedback, or what was
        learnt from them."""
        return self.num_peers > 0 or self.feedback or self.skill is not None

    def problems(self) -> Iterator[str]:
        if not (self.answer or self.solution or self.fields or self.needs_group):
            yield (
                "it shows nothing; set num_successes, num_failures, answer, solution, fields, "
                "feedback or skill, or leave the section out"
            )
        if self.failure_reward is not None and self.failure_reward >= self.success_reward:
            yield (
                f"failure_reward {self.failure_reward} is not below success_reward "
                f"{self.success_reward}, so a completion could be both; lower it"
            )
        if self.without_success == "failures" and not self.num_failures:
            yield "without_success = 'failures' shows none with num_failures = 0; set it to 1"
