"""The section `[teacher.context]`: what a privileged teacher sees besides the question. Imports no
torch."""

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
    """The server whose model writes skills, through `/v1/chat/completions`."""

    urls: Annotated[tuple[ServerURL, ...], Field(min_length=1), Mark.NO_NUMBER]
    """addresses such as `http://127.0.0.1:8000/v1`; if one fails, the next is asked"""
    model: str
    """name of the model on the server"""
    max_tokens: Count = 512
    """most tokens of what it writes, with its thoughts"""
    max_attempt_characters: Count = 8_000
    """most characters of each attempt in its prompt, counted from the end"""
    api_key_variable: Annotated[VariableName, Mark.NO_NUMBER] = "RLAD_SUMMARISER_API_KEY"
    """environment variable with the server's key, if it needs one"""
    timeout_seconds: Annotated[Positive, Mark.NO_NUMBER] = 120.0
    """limit for one request, until the end of the response"""
    num_retries: Annotated[NonNegativeInt, Mark.NO_NUMBER] = 7
    """retries of a request that every server failed; with the default pause, the run stops after 3
    minutes"""
    retry_pause_seconds: Annotated[Positive, Mark.NO_NUMBER] = 2.0
    """pause before the first retry; doubles with each retry up to a minute, with random jitter"""


class SkillConfig(Section):
    """The bank of skills of a run: what was learnt from earlier episodes, each skill in three
    fields. The teacher is shown one skill."""

    per: Literal["task", "difficulty", "problem"] = "task"
    """what has its own bank: the whole task, each difficulty, or each problem (as in the paper; for
    tasks with few problems, each used many times)"""
    exploration: NonNegative = 2**0.5
    """c of mean reward + c sqrt(ln N / n), which selects a skill once all have been tried"""
    max_skills: Count = 20
    """most skills in one bank; then a new skill replaces the one with the lowest mean reward"""
    summariser: Literal["rules", "student", "teacher", "endpoint"] = "rules"
    """what writes skills: a template that quotes the episodes (rules), or a model that reads them:
    the student, the local teacher, or a model at an `endpoint`"""
    endpoint: SkillEndpointConfig | None = None
    """server of the model for summariser = "endpoint", with an OpenAI-compatible API"""
    max_characters: Count = 400
    """most characters of each of the three fields"""

    def problems(self) -> Iterator[str]:
        if self.summariser == "endpoint" and self.endpoint is None:
            yield (
                "summariser = 'endpoint' needs a section endpoint with urls and model; add it, or "
                "use 'rules'"
            )
        if self.summariser != "endpoint" and self.endpoint is not None:
            yield (
                f"it has an endpoint, but summariser is {self.summariser!r}; set summariser to "
                "'endpoint', or leave the section out"
            )


class ContextTexts(Section):
    """The headings of what the teacher is shown. An empty heading is left out."""

    answer: str = "The correct answer:"
    """heading of the reference answer"""
    solution: str = "A reference solution:"
    """heading of the reference solution"""
    first_success: str = "A correct solution:"
    """heading of the first correct solution"""
    skill: str = "What was learnt from earlier attempts at such tasks:"
    """heading of a skill"""
    next_success: str = "Another correct solution:"
    """heading of each further correct solution"""
    failure: str = "A wrong attempt, not to be repeated:"
    """heading of each wrong attempt"""
    feedback: str = "Feedback on an earlier wrong attempt:"
    """heading of the verifier's feedback"""
    request: str = "Now solve the question that was asked first."
    """last line of the prompt"""


class ContextConfig(Section):
    """The blocks that the teacher is shown after the question, instead of a `template`."""

    answer: bool = False
    """show the reference answer"""
    solution: bool = False
    """show the whole reference solution instead of the answer; for `jsonl` problems with a field
    `solution`, or whose answer_format takes only a part of the answer field"""
    fields: tuple[str, ...] = ()
    """entries of the problem's metadata to show, such as ["hint"] or ["skill"]"""
    skill: SkillConfig | None = None
    """show a skill from the run's bank; while the bank is empty, `without_success` applies"""
    num_successes: NonNegativeInt = 0
    """most correct completions to show, from other rollouts of the group"""
    num_failures: NonNegativeInt = 0
    """most wrong completions to show"""
    feedback: bool = False
    """show the verifier's feedback on the completion itself, if it is wrong and no correct
    completion is shown"""
    choice: Literal["first", "random"] = "first"
    """which completions of the group to show: the first ones, or random ones for each completion"""
    success_reward: Number = 1.0
    """a completion is correct with at least this reward"""
    failure_reward: Number | None = None
    """a completion is wrong with at most this reward; by default, whenever it is not correct"""
    without_success: Literal["silent", "plain", "failures"] = "silent"
    """if a correct completion is wanted, there is none, and there is nothing else to show: do not
    score (silent), score after the student's own prompt (plain), or show wrong ones (failures)"""
    max_prompt_tokens: Count | None = None
    """longest prompt with all blocks; by default the teacher's context minus the completion"""
    show_thoughts: bool = False
    """show completions with their thoughts, from `<think>` to `</think>`"""
    texts: ContextTexts = ContextTexts()

    @property
    def num_peers(self) -> int:
        """The largest number of the group's completions that are shown."""
        return self.num_successes + self.num_failures

    @property
    def needs_group(self) -> bool:
        """Whether it shows something from the group's rollouts: texts, feedback, or skills."""
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
            yield (
                "without_success = 'failures' shows nothing with num_failures = 0; set "
                "num_failures to 1"
            )
