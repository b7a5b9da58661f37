"""The prompt of a privileged teacher: what it is shown, and the token ids of that."""

from collections.abc import Callable
from functools import partial
from typing import Any

from rlad.config.teacher import (
    AdapterTeacherConfig,
    CachedTeacherConfig,
    LocalTeacherConfig,
    PrivilegedTeacherConfig,
    ServedTeacherConfig,
)
from rlad.config.template import fill_template, template_names
from rlad.errors import UserError
from rlad.models.files import has_tokenizer
from rlad.models.loading import load_tokenizer
from rlad.rollouts.prompts import Prompt, chat_messages, chat_text, prompt_token_ids
from rlad.tasks import Problem
from rlad.teachers.base import Setting


def shown_values(problem: Problem, peer_solution: str | None) -> dict[str, str]:
    """What a template may name: texts and numbers of the problem's metadata, its prompt and answer,
    a peer's solution."""
    entries = {
        name: str(value)
        for name, value in problem.metadata.items()
        if isinstance(value, str | int | float)
    }
    return entries | {
        "prompt": problem.question,
        "answer": problem.answer,
        "peer_solution": peer_solution or "",
    }


def privileged_prompt(
    template: str, problem: Problem | None, peer_solution: str | None
) -> Prompt | None:
    """The teacher's prompt, in a conversation its last message; None where something that the
    template names is missing or empty.
    """
    values = shown_values(problem, peer_solution) if problem else {}
    if problem is None or not all(values.get(name) for name in template_names(template)):
        return None
    text = fill_template(template, values)
    return (*problem.messages[:-1], (problem.messages[-1][0], text)) if problem.messages else text


def encoder(settings: PrivilegedTeacherConfig, setting: Setting) -> Callable[[Prompt], list[int]]:
    """From a prompt to the ids of the student's tokens, in the form that the section gives it.

    `UserError` when the teacher's own template is wanted and there is none.
    """
    rollout, tokenizer = setting.config.rollout, setting.student_tokenizer
    changed = {
        name: value
        for name in ("system_prompt", "chat_template_kwargs")
        if (value := getattr(settings, name)) is not None
    }
    rollout = rollout.model_copy(update=changed)
    if settings.chat_template == "student":
        return partial(prompt_token_ids, tokenizer, rollout=rollout)
    theirs = load_tokenizer(model_with_template(settings.teacher))
    if not theirs.chat_template:
        raise UserError(
            f"teacher.chat_template is 'teacher', but the tokenizer of {settings.teacher.title!r} "
            "has no chat template; use "
            "'student'."
        )

    def encode(prompt: Prompt) -> list[int]:
        text = chat_text(
            theirs,
            chat_messages(prompt, rollout.system_prompt),
            rollout.chat_template_kwargs,
            whose="teacher",
        )
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    return encode


def model_with_template(settings: Any) -> str:
    """The model whose tokenizer has the teacher's chat template. `UserError` where none is in
    reach."""
    match settings:
        case LocalTeacherConfig():
            return settings.model
        case CachedTeacherConfig():
            return model_with_template(settings.teacher)
        case ServedTeacherConfig() if settings.local_model is not None:
            return settings.local_model
        case AdapterTeacherConfig() if has_tokenizer(settings.adapter):
            return settings.adapter
    raise UserError(
        f"teacher.chat_template is 'teacher', but a teacher of type {settings.type!r} has no "
        "tokenizer of its own in reach "
        "(of a served one it is local_model's); use 'student', or another type."
    )
