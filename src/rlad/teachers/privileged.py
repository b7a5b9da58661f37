"""A teacher that sees more than the student: its prompt is made anew from a template, the completion's token ids stay.

    log πT(y_t | template(prompt, answer, peer solution, ...), y_<t)

The prompt goes through the student's prompt format. Where something that the template names is missing or empty for a
completion (no other rollout of its group was correct), the teacher is given the student's own prompt.
"""

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlad.language_model import context_tokens, load_model_config
from rlad.prompt_template import fill_template, template_names
from rlad.prompts import prompt_token_ids
from rlad.tasks import Problem, make_task
from rlad.teacher_config import (
    AdapterTeacherConfig,
    CachedTeacherConfig,
    EMATeacherConfig,
    LocalTeacherConfig,
    PrivilegedTeacherConfig,
    SeveralTeachersConfig,
)
from rlad.teachers import Setting, Teacher, TeacherRequest, build_teacher
from rlad.teachers import check_teacher as check_inner
from rlad.teachers.compatibility import Finding

NUM_PROBED_PROBLEMS = 20


class PrivilegedTeacher(Teacher):
    """Asks another teacher about the same completions behind another prompt; NaN where both do not fit into `context`."""

    def __init__(self, teacher: Teacher, template: str, *, encode: Callable[[str], list[int]], context: int | None):
        """`encode` gives a prompt's token ids; `context` is the teacher's, in tokens, None where it is not stated."""
        self.teacher, self.template, self.encode, self.context = teacher, template, encode, context
        self.identity = f"{teacher.identity}, privileged by {template!r}"
        self._num_asked = self._num_shown = 0

    def logprobs(self, requests: Sequence[TeacherRequest]) -> list[Tensor]:
        privileged = self._privileged(requests)
        fits = [self.context is None or len(r.prompt) + len(r.completion) <= self.context for r in privileged]
        is_told = [asked is not told and does for asked, told, does in zip(requests, privileged, fits, strict=True)]
        self._num_asked, self._num_shown = self._num_asked + len(is_told), self._num_shown + sum(is_told)
        scores = iter(self.teacher.logprobs([request for request, does in zip(privileged, fits, strict=True) if does]))
        missing = (torch.full((len(request.completion),), torch.nan) for request in privileged)
        return [next(scores) if does else nan for does, nan in zip(fits, missing, strict=True)]

    def _privileged(self, requests: Sequence[TeacherRequest]) -> list[TeacherRequest]:
        texts = [privileged_text(self.template, request.problem, request.peer_solution) for request in requests]
        prompts = {text: self.encode(text) for text in set(texts) if text is not None}
        pairs = zip(requests, texts, strict=True)
        return [request if text is None else replace(request, prompt=prompts[text]) for request, text in pairs]

    def after_step(self) -> None:
        self.teacher.after_step()

    def state(self) -> Any:
        return self.teacher.state()

    def load_state(self, state: Any) -> None:
        self.teacher.load_state(state)

    def pop_metrics(self) -> dict[str, float]:
        """With the share of the completions since the last call for which the teacher saw what its template names."""
        metrics = self.teacher.pop_metrics()
        if self._num_asked:
            metrics["teacher/privileged/frac"] = self._num_shown / self._num_asked
        self._num_asked = self._num_shown = 0
        return metrics

    def close(self) -> None:
        self.teacher.close()


def shown_values(problem: Problem, peer_solution: str | None) -> dict[str, str]:
    """What a template may name: texts and numbers of the problem's metadata, its prompt and answer, a peer's solution."""
    entries = {name: str(value) for name, value in problem.metadata.items() if isinstance(value, str | int | float)}
    return entries | {"prompt": problem.prompt, "answer": problem.answer, "peer_solution": peer_solution or ""}


def privileged_text(template: str, problem: Problem | None, peer_solution: str | None) -> str | None:
    """The teacher's prompt; None where something that the template names is missing or empty."""
    values = shown_values(problem, peer_solution) if problem else {}
    return fill_template(template, values) if all(values.get(name) for name in template_names(template)) else None


def check_teacher(settings: PrivilegedTeacherConfig, setting: Setting) -> list[Finding]:
    with closing(make_task(**setting.config.task.model_dump())) as task:
        problems = [task.problem("train", i, seed=setting.config.seed) for i in range(NUM_PROBED_PROBLEMS)]
    findings = [*check_inner(settings.teacher, setting), *_check_names(settings.template, problems)]
    if any(finding.level == "error" for finding in findings):
        return findings
    return [*findings, _check_length(settings, setting, problems)]


def _check_names(template: str, problems: Sequence[Problem]) -> list[Finding]:
    """Whether problems have what a template names, and whether that is more than the student sees."""
    wanted, values = sorted(template_names(template)), [shown_values(problem, "a solution") for problem in problems]
    allowed = sorted({name for one in values for name in one})
    if unknown := [name for name in wanted if name not in allowed]:
        allowed_names = ", ".join(f"{{{name}}}" for name in allowed)
        message = f"its template names {{{unknown[0]}}}, which the task's problems do not have; use {allowed_names}."
        return [Finding("error", "template", message)]
    if wanted == ["prompt"]:
        message = "its template shows nothing but the prompt, which the student sees too; add {answer} or {peer_solution}."
        return [Finding("warning", "template", message)]
    for name in wanted:
        if num_empty := sum(not one.get(name) for one in values):
            message = (
                f"{num_empty} of {len(values)} problems have no {{{name}}}: the teacher is given the student's prompt there"
            )
            return [Finding("warning", "template", message)]
    return [Finding("ok", "template", f"shows {', '.join(f'{{{name}}}' for name in wanted)}")]


def _check_length(settings: PrivilegedTeacherConfig, setting: Setting, problems: Sequence[Problem]) -> Finding:
    """Whether the longest privileged prompt among `problems` and its completion fit, a peer's solution at its longest too."""
    context, completion = teacher_context(settings.teacher, setting), setting.config.rollout.max_completion_tokens
    encode = partial(prompt_token_ids, setting.student_tokenizer, prompt_format=setting.config.rollout.prompt_format)
    texts = [privileged_text(settings.template, problem, "?") for problem in problems]
    longest = max((len(encode(text)) for text in texts if text is not None), default=0) + completion
    with_peer = longest + completion if "peer_solution" in template_names(settings.template) else longest
    if context is not None and longest > context:
        message = (
            f"the longest of {len(problems)} privileged prompts with its completion needs {longest} tokens, but the teacher's "
            f"context has {context}; shorten the template, or lower rollout.max_completion_tokens."
        )
        return Finding("error", "privileged context", message)
    if context is not None and with_peer > context:
        message = f"with a long peer solution up to {with_peer} tokens of {context}: what does not fit is not scored"
        return Finding("warning", "privileged context", message)
    return Finding("ok", "privileged context", f"up to {with_peer} of {context or 'unlimited'} tokens")


def teacher_context(settings: Any, setting: Setting) -> int | None:
    """Tokens of the context of the teacher that a section names; None where it is not stated."""
    match settings:
        case LocalTeacherConfig():
            return context_tokens(load_model_config(settings.model))
        case AdapterTeacherConfig() | EMATeacherConfig():
            return setting.student_context
        case SeveralTeachersConfig():
            known = [context for one in settings.teachers.values() if (context := teacher_context(one, setting)) is not None]
            return min(known, default=None)
        case PrivilegedTeacherConfig() | CachedTeacherConfig():
            return teacher_context(settings.teacher, setting)
        case _:  # served: its server says so itself
            return None


def make_teacher(settings: PrivilegedTeacherConfig, setting: Setting) -> PrivilegedTeacher:
    return PrivilegedTeacher(
        build_teacher(settings.teacher, setting),
        settings.template,
        encode=partial(prompt_token_ids, setting.student_tokenizer, prompt_format=setting.config.rollout.prompt_format),
        context=teacher_context(settings.teacher, setting),
    )
