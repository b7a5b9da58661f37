"""A teacher with a prompt of its own, made anew from a template; the completion's token ids stay.

    log πT(y_t | template(prompt, answer, peer solution, ...), y_<t)

Where something that the template names is missing or empty for a completion (no other rollout of
its group was correct), the teacher is given what the student sees, in the teacher's form.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

from rlad.config.teacher import (
    AdapterTeacherConfig,
    CachedTeacherConfig,
    EMATeacherConfig,
    LocalTeacherConfig,
    PrivilegedTeacherConfig,
    SeveralTeachersConfig,
)
from rlad.config.template import template_names
from rlad.findings import Finding
from rlad.models.loading import context_tokens, load_model_config, token_id
from rlad.rollouts.prompts import Prompt
from rlad.tasks import Problem, make_task
from rlad.teachers import build_teacher
from rlad.teachers import check_teacher as check_inner
from rlad.teachers.base import Answer, Setting, Teacher, TeacherRequest, TeacherWrapper
from rlad.teachers.privileged_prompt import encoder, privileged_prompt, shown_values

NUM_PROBED_PROBLEMS = 20
_FORM = ("chat_template", "system_prompt", "chat_template_kwargs", "end_token")
"""settings that make other prompts, or another end, besides the template"""


class PrivilegedTeacher(TeacherWrapper):
    """Asks another teacher about the same completions behind another prompt; NaN where both do not
    fit into `context`."""

    def __init__(
        self,
        teacher: Teacher,
        template: str,
        *,
        encode: Callable[[Prompt], list[int]],
        context: int | None,
        form: str = "",
        ends: Mapping[int, int] | None = None,
    ):
        """`encode` gives a prompt's token ids; `context` is the teacher's, in tokens, None where it
        is not stated. `form` names how its prompts differ from the student's besides the template;
        empty where they do not. `ends` maps the student's end tokens to the teacher's.
        """
        super().__init__(teacher)
        self.template, self.encode, self.context = template, encode, context
        self.identity = f"{teacher.identity}, privileged by {template!r}" + (
            f" in the form {form}" if form else ""
        )
        self._has_own_form, self._ends = bool(form), ends or {}
        self._num_asked = self._num_shown = 0

    def submit(self, requests: Sequence[TeacherRequest]) -> list[Answer]:
        prompts = [
            privileged_prompt(self.template, request.problem, request.peer_solution)
            for request in requests
        ]
        privileged = self._privileged(requests, prompts)
        fits = [
            self.context is None or len(r.prompt) + len(r.completion) <= self.context
            for r in privileged
        ]
        is_told = [prompt is not None and does for prompt, does in zip(prompts, fits, strict=True)]
        self._num_asked += len(is_told)
        self._num_shown += sum(is_told)
        answers = iter(
            self.teacher.submit([request for request, does in zip(privileged, fits) if does])
        )
        return [
            next(answers) if does else Answer.missing(request)
            for request, does in zip(privileged, fits)
        ]

    def _privileged(
        self, requests: Sequence[TeacherRequest], prompts: Sequence[Prompt | None]
    ) -> list[TeacherRequest]:
        def unprivileged(request: TeacherRequest) -> Prompt | None:
            return request.problem.asked if self._has_own_form and request.problem else None

        prompts = [
            unprivileged(r) if prompt is None else prompt
            for r, prompt in zip(requests, prompts, strict=True)
        ]
        ids = {prompt: self.encode(prompt) for prompt in set(prompts) if prompt is not None}
        pairs = zip(requests, prompts, strict=True)
        return [
            replace(
                r,
                prompt=r.prompt if prompt is None else ids[prompt],
                completion=self._with_own_end(r.completion),
            )
            for r, prompt in pairs
        ]

    def _with_own_end(self, completion: Sequence[int]) -> Sequence[int]:
        """The same length and the same event: the teacher's end token in the place of the
        student's."""
        if not completion or completion[-1] not in self._ends:
            return completion
        return [*completion[:-1], self._ends[completion[-1]]]

    def pop_metrics(self) -> dict[str, float]:
        """With the share of the completions since the last call for which the teacher saw what its
        template names."""
        metrics = self.teacher.pop_metrics()
        if self._num_asked:
            metrics["teacher/privileged/frac"] = self._num_shown / self._num_asked
        self._num_asked = self._num_shown = 0
        return metrics


def check_teacher(settings: PrivilegedTeacherConfig, setting: Setting) -> list[Finding]:
    with closing(make_task(**setting.config.task.model_dump())) as task:
        problems = [
            task.problem("train", i, seed=setting.config.seed) for i in range(NUM_PROBED_PROBLEMS)
        ]
    form = ("chat template",) if settings.chat_template == "teacher" else ()
    mended = (*form, "end token") if settings.end_token is not None else form
    findings = [
        finding
        for finding in check_inner(settings.teacher, setting)
        if finding.subject not in mended
    ]
    findings += _check_names(settings, problems)
    if settings.end_token is not None:
        own_end_token(settings, setting)
        findings.append(
            Finding(
                "ok",
                "end token",
                f"the student's is scored as the teacher's {settings.end_token!r}",
            )
        )
    if any(finding.level == "error" for finding in findings):
        return findings
    return [*findings, _check_length(settings, setting, problems)]


def _check_names(settings: PrivilegedTeacherConfig, problems: Sequence[Problem]) -> list[Finding]:
    """Whether problems have what a template names, and whether that is more than the student
    sees."""
    template = settings.template
    wanted, values = (
        sorted(template_names(template)),
        [shown_values(problem, "a solution") for problem in problems],
    )
    allowed = sorted({name for one in values for name in one})
    if unknown := [name for name in wanted if name not in allowed]:
        allowed_names = ", ".join(f"{{{name}}}" for name in allowed)
        message = f"its template names {{{unknown[0]}}}, which the task's problems do not have; use {allowed_names}."
        return [Finding("error", "template", message)]
    if wanted == ["prompt"] and not settings.has_own_form:
        message = "its template shows nothing but the prompt, which the student sees too; add {answer} or {peer_solution}."
        return [Finding("warning", "template", message)]
    for name in wanted:
        if num_empty := sum(not one.get(name) for one in values):
            message = f"{num_empty} of {len(values)} problems have no {{{name}}}: the teacher is given the student's prompt there"
            return [Finding("warning", "template", message)]
    return [Finding("ok", "template", f"shows {', '.join(f'{{{name}}}' for name in wanted)}")]


def _check_length(
    settings: PrivilegedTeacherConfig, setting: Setting, problems: Sequence[Problem]
) -> Finding:
    """Whether the longest privileged prompt among `problems` and its completion fit, a peer's
    solution at its longest too."""
    context, completion = (
        teacher_context(settings.teacher, setting),
        setting.config.rollout.max_completion_tokens,
    )
    encode = encoder(settings, setting)
    prompts = [privileged_prompt(settings.template, problem, "?") for problem in problems]
    longest = (
        max((len(encode(prompt)) for prompt in prompts if prompt is not None), default=0)
        + completion
    )
    with_peer = (
        longest + completion if "peer_solution" in template_names(settings.template) else longest
    )
    if context is not None and longest > context:
        message = (
            f"the longest of {len(problems)} privileged prompts with its completion needs "
            f"{longest} tokens, but the teacher's "
            f"context has {context}; shorten the template, or lower rollout.max_completion_tokens."
        )
        return Finding("error", "privileged context", message)
    if context is not None and with_peer > context:
        message = f"with a long peer solution up to {with_peer} tokens of {context}: what does not fit is not scored"
        return Finding("warning", "privileged context", message)
    return Finding(
        "ok", "privileged context", f"up to {with_peer} of {context or 'unlimited'} tokens"
    )


def teacher_context(settings: Any, setting: Setting) -> int | None:
    """Tokens of the context of the teacher that a section names; None where it is not stated."""
    match settings:
        case LocalTeacherConfig():
            return context_tokens(load_model_config(settings.model))
        case AdapterTeacherConfig() | EMATeacherConfig():
            return setting.student_context
        case SeveralTeachersConfig():
            known = [
                context
                for one in settings.teachers.values()
                if (context := teacher_context(one, setting)) is not None
            ]
            return min(known, default=None)
        case PrivilegedTeacherConfig() | CachedTeacherConfig():
            return teacher_context(settings.teacher, setting)
        case _:  # served: its server says so itself
            return None


def own_end_token(settings: PrivilegedTeacherConfig, setting: Setting) -> int:
    """The id of the teacher's end token. `UserError` when it is no token."""
    assert settings.end_token is not None
    return token_id(setting.student_tokenizer, settings.end_token, "teacher.end_token")


def make_teacher(settings: PrivilegedTeacherConfig, setting: Setting) -> PrivilegedTeacher:
    assert setting.student is not None
    form = {
        name: value
        for name in _FORM
        if (value := getattr(settings, name)) != PrivilegedTeacherConfig.model_fields[name].default
    }
    end = None if settings.end_token is None else own_end_token(settings, setting)
    return PrivilegedTeacher(
        build_teacher(settings.teacher, setting),
        settings.template,
        encode=encoder(settings, setting),
        context=teacher_context(settings.teacher, setting),
        form=json.dumps(form, sort_keys=True) if form else "",
        ends={} if end is None else dict.fromkeys(setting.student.eos_token_ids, end),
    )
