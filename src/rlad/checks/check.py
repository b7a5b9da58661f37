"""`rlad check`: what a config will do and whether it can, without training."""

import os
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from rlad.checks.contamination import MOST_PROBLEMS, RUN_WORDS, find_contamination, finite_problems
from rlad.checks.memory import MemoryEstimate, compare_memory, estimate_memory, memory_of
from rlad.checks.trial import Trial, describe_trial, run_trial
from rlad.config.catalogue import describe
from rlad.config.run import RunConfig
from rlad.config.teacher import LocalTeacherConfig, single_teachers
from rlad.errors import RladError, UserError, out_of_memory
from rlad.findings import Finding
from rlad.models.files import require_weights
from rlad.models.loading import (
    context_tokens,
    end_token_ids,
    load_generation_config,
    load_model_config,
    load_tokenizer,
    pick_device,
)
from rlad.models.student import require_base_model
from rlad.rollouts.prompts import longest_prompt
from rlad.runs.directory import RunDirectory
from rlad.tasks import Problem, make_task
from rlad.tasks.several import require_working_verifier
from rlad.teachers import check_teacher
from rlad.teachers.base import Setting

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class CheckReport:
    config: RunConfig
    plan: list[str]
    findings: list[Finding]
    memory: MemoryEstimate | None
    trial: Trial | None
    """None when something before it cannot work, or no models were to be loaded"""

    @property
    def errors(self) -> list[Finding]:
        return _errors(self.findings)

    def to_json(self) -> dict[str, Any]:
        memory = self.memory
        return {
            "ok": not self.errors,
            "config": self.config.model_dump(mode="json"),
            "plan": self.plan,
            "findings": [asdict(finding) for finding in self.findings],
            "memory_bytes": asdict(memory) | {"total": memory.total} if memory else None,
            "trial": self.trial.to_json() if self.trial else None,
        }


def check_run(
    config: RunConfig, *, with_models: bool = True, for_verl: bool = False
) -> CheckReport:
    """Look at everything that can be known before weights are loaded, then make a trial of the
    models. Nothing is written.

    With `for_verl` also whether verl knows our objectives. What cannot work is an `error` among the
    findings.
    """
    findings: list[Finding] = []
    if for_verl:
        from rlad.engines.verl.check import check_verl

        findings += check_verl()

    def attempt(subject: str, check: Callable[[], Result]) -> Result | None:
        try:
            return check()
        except RladError as error:
            findings.append(Finding("error", subject, str(error)))
            return None

    for subject, check in _CHECKS.items():
        findings += attempt(subject, lambda check=check: check(config)) or []
    # Each stage needs what the ones before found: prompts need a tokenizer and a task, memory the
    # longest prompt, and a trial room for the models.
    memory = None
    if not _errors(findings) and (
        num_tokens := attempt("prompts", lambda: _longest_prompt(config))
    ):
        findings.append(_prompts(config, num_tokens))
        memory = attempt("memory", lambda: estimate_memory(config, num_tokens))
    fits = True
    if memory is not None:
        device = pick_device(config.student.device)
        finding = compare_memory(memory, memory_of(str(device)))
        fits = finding.level == "ok"
        findings.append(finding)
    trial = None
    if with_models and not fits:
        message = "left out, as the models may not fit into the memory that is free"
        findings.append(Finding("warning", "trial", message))
    elif with_models and not _errors(findings):
        trial = attempt("trial", lambda: _try_out(config))
    if trial is not None:
        findings += describe_trial(trial, config)
    return CheckReport(config, describe_plan(config), findings, memory, trial)


def _errors(findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.level == "error"]


def describe_plan(config: RunConfig) -> list[str]:
    """Say what a step computes, one line each."""
    rollout = config.rollout
    loop = config.optimization
    objective = config.objective
    num_rollouts = rollout.prompts_per_batch * rollout.group_size
    plan = [
        f"{loop.num_steps} optimiser steps, {loop.steps_per_rollout_batch} on each batch of "
        f"{num_rollouts} rollouts ({rollout.prompts_per_batch} prompts x {rollout.group_size})",
        *describe("objectives", objective.type).partition("\n\n[")[0].splitlines(),
        objective.teacher_work,
    ]
    if loop.kl_coef:
        plan.append("the initial student scores each sampled token once (KL leash)")
    if loop.steps_per_rollout_batch > 1:
        plan.append(
            "the old policy scores each sampled token once (several steps on one rollout batch)"
        )
    if objective.zero_advantage_is_zero_gradient and not loop.kl_coef:
        plan.append(
            "completions of advantage 0 are left out of scoring and update: they contribute "
            "exactly nothing"
        )
    return plan


# --- what each check looks at ---------------------------------------------------------------------


def _check_run_dir(config: RunConfig) -> list[Finding]:
    run = RunDirectory(config.directory)
    subject = "run directory"
    if run.exists():
        message = (
            f"{run.path} holds a run already: train needs --resume, --overwrite or another run_dir"
        )
        return [Finding("warning", subject, message)]
    run.require_free(overwrite=False)
    parent = next(p for p in (run.path.absolute(), *run.path.absolute().parents) if p.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise UserError(f"{run.path} cannot be made in {parent}; choose another run_dir.")
    return [Finding("ok", subject, f"{run.path} is free")]


def _check_devices(config: RunConfig) -> list[Finding]:
    devices = {"student": config.student.device}
    for name, teacher in single_teachers(config.teacher):
        if isinstance(teacher, LocalTeacherConfig):
            devices[name] = teacher.device
    picked = [f"{who} {pick_device(device)}" for who, device in devices.items()]
    return [Finding("ok", "device", ", ".join(picked))]


def _check_trackers(config: RunConfig) -> list[Finding]:
    if not config.logging.trackers:
        return []
    from rlad.training.trackers import require_trackers

    require_trackers(config)
    return [Finding("ok", "trackers", f"{', '.join(config.logging.trackers)}: installed")]


def _check_models(config: RunConfig) -> list[Finding]:
    settings = config.student
    tokenizer = load_tokenizer(settings.model)
    model_config = load_model_config(settings.model)
    require_weights(settings.model)
    require_base_model(config)
    context = context_tokens(model_config)
    vocabulary = f"{len(tokenizer)} tokens in {model_config.get_text_config().vocab_size} rows"
    findings = [
        Finding("ok", "student", f"{settings.model} ({model_config.model_type}), {vocabulary}"),
        _special_tokens(config, tokenizer, model_config),
    ]
    if config.teacher is None or not config.needs_teacher:
        return [*findings, Finding("ok", "context", f"student {context or 'not stated'} tokens")]
    return [
        *findings,
        Finding("ok", "teacher", config.teacher.title),
        *check_teacher(config.teacher, Setting(config, tokenizer, context)),
    ]


def _special_tokens(config: RunConfig, tokenizer: Any, model_config: Any) -> Finding:
    settings = config.student
    generation = load_generation_config(settings.model)
    ids = end_token_ids(model_config, generation, tokenizer, settings.end_tokens)
    end = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(list(ids))))
    begin, pad = (
        repr(token) if token else "none" for token in (tokenizer.bos_token, tokenizer.pad_token)
    )
    message = f"a completion ends with {end}; begin {begin}, pad {pad}"
    return Finding("ok", "special tokens", message)


def _check_task(config: RunConfig) -> list[Finding]:
    with closing(make_task(**config.task.model_dump())) as task:
        require_working_verifier(task)
        return [Finding("ok", "task", f"{task.name}, its verifier judges")]


def _check_held_out(config: RunConfig) -> list[Finding]:
    """Whether problems that measure the student are among those that train it. Tasks that generate
    problems see to that themselves."""
    loop = config.optimization
    num_batches = -(-loop.num_steps // loop.steps_per_rollout_batch)
    # Only what this run will see: it may end before its training set does.
    num_train = num_batches * config.rollout.prompts_per_batch
    with ExitStack() as tasks:
        task = tasks.enter_context(closing(make_task(**config.task.model_dump())))
        train = list(finite_problems(task, "train", num_train, seed=config.seed))
        if not train:
            return []
        held_out: list[Problem] = [
            *finite_problems(task, "validation"),
            *finite_problems(task, "test"),
        ]
        if config.ood_task is not None:
            ood_task = tasks.enter_context(closing(make_task(**config.ood_task.model_dump())))
            held_out += finite_problems(ood_task, "test")
    seen = find_contamination(train, held_out)
    subject = "held-out problems"
    if not seen.num_found:
        message = (
            f"none of {seen.num_held_out} shares {RUN_WORDS} words in a row with any of "
            f"{seen.num_train} training problems"
        )
        if seen.has_phrases:
            message += f", apart from phrases that are in more than {MOST_PROBLEMS} of either"
        return [Finding("ok", subject, message)]
    message = (
        f"{seen.num_found} of {seen.num_held_out} are among the {seen.num_train} training "
        f"problems ({seen.num_same} as they are, the others with {RUN_WORDS} words in a row or all "
        f"of a shorter one), for example {seen.example[:120]!r}; remove them from those."
    )
    return [Finding("error" if seen.num_same else "warning", subject, message)]


_CHECKS: dict[str, Callable[[RunConfig], list[Finding]]] = {
    "run directory": _check_run_dir,
    "device": _check_devices,
    "trackers": _check_trackers,
    "models": _check_models,
    "task": _check_task,
    "held-out problems": _check_held_out,
}


def _longest_prompt(config: RunConfig) -> int:
    with ExitStack() as tasks:
        task, *others = [
            tasks.enter_context(closing(make_task(**settings.model_dump())))
            for settings in (config.task, config.ood_task)
            if settings is not None
        ]
        tokenizer = load_tokenizer(config.student.model)
        return longest_prompt(
            config, task, tokenizer, _context(config), others[0] if others else None
        )


def _prompts(config: RunConfig, num_tokens: int) -> Finding:
    needed = num_tokens + config.rollout.max_completion_tokens
    of = _context(config) or "unlimited"
    message = f"the longest has {num_tokens} tokens, with its completion {needed} of {of}"
    return Finding("ok", "prompts", message)


def _context(config: RunConfig) -> int | None:
    return context_tokens(load_model_config(config.student.model))


def _try_out(config: RunConfig) -> Trial:
    """Run the trial. Raises `RunFailedError` for a want of memory too."""
    try:
        return run_trial(config)
    except RuntimeError as error:
        if (failure := out_of_memory(error)) is None:
            raise
        raise failure from None
