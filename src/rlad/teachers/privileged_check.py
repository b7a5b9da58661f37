"""Check a privileged teacher before weights are loaded: whether problems have what it should be
shown, and whether that fits into its context."""

from collections.abc import Sequence
from contextlib import closing

from rlad.config.teacher import PrivilegedTeacherConfig
from rlad.config.template import template_names
from rlad.findings import Finding
from rlad.models.without_weights import token_id
from rlad.tasks import Problem, make_task
from rlad.tasks.base import reward_range
from rlad.teachers import check_teacher as check_inner
from rlad.teachers.base import Setting
from rlad.teachers.context_check import check_context
from rlad.teachers.contexts import encoded
from rlad.teachers.privileged import (
    FORM,
    encoder,
    make_blocks,
    privileged_prompt,
    shown_values,
    teacher_context,
)

NUM_PROBED_PROBLEMS = 20


def check_privileged(settings: PrivilegedTeacherConfig, setting: Setting) -> list[Finding]:
    run = setting.config
    with closing(make_task(**run.task.model_dump())) as task:
        problems = [task.problem("train", i, seed=run.seed) for i in range(NUM_PROBED_PROBLEMS)]
        rewards = reward_range(task)
    # Differences in template and end token are handled by the section itself.
    settled = {"chat template"} if settings.chat_template == "teacher" else set()
    if settings.end_token is not None:
        settled.add("end token")
    inner = check_inner(settings.teacher, setting)
    findings = [finding for finding in inner if finding.subject not in settled]
    if settings.context is None:
        findings.append(_check_names(settings, problems))
    else:
        findings += check_context(settings.context, problems, run.rollout.group_size, rewards)
    if settings.end_token is not None:
        token_id(setting.student_tokenizer, settings.end_token, "teacher.end_token")
        message = f"the student's is scored as the teacher's {settings.end_token!r}"
        findings.append(Finding("ok", "end token", message))
    if not any(finding.level == "error" for finding in findings):
        findings.append(_check_length(settings, setting, problems))
    return findings


def _check_names(settings: PrivilegedTeacherConfig, problems: Sequence[Problem]) -> Finding:
    """Check whether problems have what the template names, and whether that is more than the
    student sees."""
    wanted = sorted(template_names(settings.template))
    shown = [shown_values(problem, "a solution") for problem in problems]
    allowed = sorted({name for one in shown for name in one})
    num_empty = {name: sum(not one.get(name) for one in shown) for name in wanted}
    lacking = sorted(filter(num_empty.get, wanted), key=lambda name: -num_empty[name])
    level = "warning"
    if unknown := [name for name in wanted if name not in allowed]:
        level = "error"
        message = (
            f"its template names {{{unknown[0]}}}, which the task's problems do not have; use "
            f"{_in_braces(allowed)}."
        )
    elif wanted == ["prompt"] and not settings.model_dump(
        include=FORM - {"end_token"}, exclude_defaults=True
    ):
        message = (
            "its template shows nothing but the prompt, which the student sees too; add {answer} "
            "or {peer_solution}."
        )
    elif lacking and num_empty[lacking[0]] == len(shown):
        level = "error"
        message = (
            f"its template names {{{lacking[0]}}}, which none of the {len(shown)} problems looked "
            "at has; use another entry, or another type of teacher."
        )
    elif lacking:
        message = (
            f"{num_empty[lacking[0]]} of {len(shown)} problems have no {{{lacking[0]}}}: the "
            "teacher is given the student's prompt there"
        )
    else:
        level = "ok"
        message = f"shows {_in_braces(wanted)}"
    return Finding(level, "template", message)


def _in_braces(names: Sequence[str]) -> str:
    return ", ".join(f"{{{name}}}" for name in names)


def _check_length(
    settings: PrivilegedTeacherConfig, setting: Setting, problems: Sequence[Problem]
) -> Finding:
    """Check whether the longest prompt among `problems` and its completion fit, both with as little
    and with as much as may be shown."""
    most = setting.config.rollout.max_completion_tokens
    rooms = [teacher_context(settings.teacher, setting)]
    if settings.context is None:
        encode = encoder(settings, setting)
        prompts = [
            (privileged_prompt(settings.template, problem, "?"), problem) for problem in problems
        ]
        bare = max(
            (len(encoded(encode, one, problem)) for one, problem in prompts if one is not None),
            default=0,
        )
        # A completion shown is at most as long as a completion may be.
        whole = bare + most * ("peer_solution" in template_names(settings.template))
        too_long = (
            "privileged prompts with its completion needs {needed} tokens, but the teacher's "
            "context has {room}; shorten the template, or lower rollout.max_completion_tokens."
        )
        left_out = "what does not fit is not scored"
    else:
        if settings.context.max_prompt_tokens is not None:
            rooms.append(settings.context.max_prompt_tokens + most)
        blocks = make_blocks(settings.context, settings, setting)
        bare = max(len(blocks.token_ids(problem, [])) for problem in problems)
        whole = max(blocks.num_tokens(problem, most) for problem in problems)
        too_long = (
            "questions with only its completion needs {needed} tokens, but the teacher has {room} "
            "for both; lower rollout.max_completion_tokens, or raise "
            "teacher.context.max_prompt_tokens if that is set."
        )
        left_out = "completions that are shown will be shortened in the middle, or left out"
    room = min((tokens for tokens in rooms if tokens is not None), default=None)
    level = "ok"
    message = f"up to {whole + most} of {room or 'unlimited'} tokens"
    if room is not None and bare + most > room:
        level = "error"
        too_long = too_long.format(needed=bare + most, room=room)
        message = f"the longest of {len(problems)} {too_long}"
    elif room is not None and whole + most > room:
        level = "warning"
        message += f": {left_out}"
    return Finding(level, "privileged context", message)
