"""`rlad check`: what a config will do and whether it can, without training.

Imports torch inside of functions: most of what can be said before weights are loaded needs none,
and its import takes seconds.
"""

import os
import traceback
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rlad.checks.contamination import MOST_PROBLEMS, RUN_WORDS, find_contamination, finite_problems
from rlad.checks.memory import MemoryEstimate, compare_memory, estimate_memory, memory_of
from rlad.config.catalogue import describe
from rlad.config.run import RunConfig
from rlad.config.teacher import LocalTeacherConfig, single_teachers
from rlad.errors import RladError, UserError
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
from rlad.tasks import make_task
from rlad.tasks.probe import require_working_verifier
from rlad.teachers import check_teacher
from rlad.teachers.base import Setting

if TYPE_CHECKING:
    from rlad.checks.trial import Trial

Result = TypeVar("Result")
_PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True, slots=True)
class CheckReport:
    config: RunConfig
    plan: list[str]
    findings: list[Finding]
    memory: MemoryEstimate | None
    trial: "Trial | None"
    """None when something before it cannot work, or no models were to be loaded"""

    @property
    def errors(self) -> list[Finding]:
        return _errors(self.findings)

    def to_json(self) -> dict[str, Any]:
        return {
            "ok": not self.errors,
            "config": self.config.model_dump(mode="json"),
            "plan": self.plan,
            "findings": [asdict(finding) for finding in self.findings],
            "memory_bytes": None
            if self.memory is None
            else asdict(self.memory) | {"total": self.memory.total},
            "trial": None if self.trial is None else self.trial.to_json(),
        }


def _errors(findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.level == "error"]


def check_run(
    config: RunConfig, *, with_models: bool = True, for_verl: bool = False
) -> CheckReport:
    """Everything that can be known before weights are loaded, then a trial of the models. Nothing
    is written.

    With `for_verl` also whether verl knows our objectives. What cannot work is an `error` among the
    findings.
    """
    findings: list[Finding] = _check_verl() if for_verl else []

    def attempt(subject: str, check: Callable[[RunConfig], Result]) -> Result | None:
        try:
            return check(config)
        except RladError as error:
            findings.append(Finding("error", subject, str(error)))
            return None

    findings += attempt("run directory", _check_run_dir) or []
    findings += attempt("device", _check_devices) or []
    findings += attempt("trackers", _check_trackers) or []
    findings += attempt("models", _check_models) or []
    findings += attempt("task", _check_task) or []
    findings += attempt("held-out problems", _check_held_out) or []
    memory = None
    if not _errors(findings) and (prompt_tokens := attempt("prompts", _longest_prompt)):
        needed, context = (
            prompt_tokens + config.rollout.max_completion_tokens,
            _context(config) or "unlimited",
        )
        message = (
            f"the longest has {prompt_tokens} tokens, with its completion {needed} of {context}"
        )
        findings.append(Finding("ok", "prompts", message))
        memory = attempt("memory", partial(estimate_memory, prompt_tokens=prompt_tokens))
    if memory is not None:
        findings.append(compare_memory(memory, memory_of(str(pick_device(config.student.device)))))
        if with_models and findings[-1].level != "ok":
            findings.append(
                Finding(
                    "warning",
                    "trial",
                    "left out, as the models may not fit into the memory that is free",
                )
            )
    trial = None
    if (
        with_models
        and findings
        and all(f.subject != "trial" and f.level != "error" for f in findings)
    ):
        trial = attempt("trial", _try_out)
    if trial is not None:
        from rlad.checks.trial_report import describe_trial

        findings += describe_trial(trial, config)
    return CheckReport(config, describe_plan(config), findings, memory, trial)


def describe_plan(config: RunConfig) -> list[str]:
    """What a step computes, one line each."""
    rollout, loop = config.rollout, config.optimization
    num_rollouts = rollout.prompts_per_batch * rollout.group_size
    plan = [
        f"{loop.num_steps} optimiser steps, {loop.steps_per_rollout_batch} on each batch of "
        f"{num_rollouts} rollouts "
        f"({rollout.prompts_per_batch} prompts x {rollout.group_size})",
        *describe("objectives", config.objective.type).partition("\n\n[")[0].splitlines(),
        config.objective.teacher_work,
    ]
    if loop.kl_coef:
        plan.append("the initial student scores each sampled token once (KL leash)")
    if loop.steps_per_rollout_batch > 1:
        plan.append(
            "the old policy scores each sampled token once (several steps on one rollout batch)"
        )
    if config.objective.zero_advantage_is_zero_gradient and not loop.kl_coef:
        plan.append(
            "completions of advantage 0 are left out of scoring and update: they contribute "
            "exactly nothing"
        )
    return plan


def _check_verl() -> list[Finding]:
    from rlad.engines.verl.check import check_verl

    return check_verl()


def _check_run_dir(config: RunConfig) -> list[Finding]:
    run = RunDirectory(config.directory)
    if run.exists():
        message = (
            f"{run.path} holds a run already: train needs --resume, --overwrite or another run_dir"
        )
        return [Finding("warning", "run directory", message)]
    run.require_free(overwrite=False)
    parent = next(p for p in (run.path.absolute(), *run.path.absolute().parents) if p.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        return [
            Finding(
                "error",
                "run directory",
                f"{run.path} cannot be made in {parent}; choose another run_dir.",
            )
        ]
    return [Finding("ok", "run directory", f"{run.path} is free")]


def _check_devices(config: RunConfig) -> list[Finding]:
    devices = {"student": config.student.device}
    for name, teacher in single_teachers(config.teacher):
        if isinstance(teacher, LocalTeacherConfig):
            devices[name] = teacher.device
    picked = {who: pick_device(device) for who, device in devices.items()}
    return [Finding("ok", "device", ", ".join(f"{who} {device}" for who, device in picked.items()))]


def _check_trackers(config: RunConfig) -> list[Finding]:
    if not config.logging.trackers:
        return []
    from rlad.training.trackers import require_trackers

    require_trackers(config)
    return [Finding("ok", "trackers", f"{', '.join(config.logging.trackers)}: installed")]


def _check_models(config: RunConfig) -> list[Finding]:
    student, student_config = (
        load_tokenizer(config.student.model),
        load_model_config(config.student.model),
    )
    require_weights(config.student.model)
    require_base_model(config)
    findings = [Finding("ok", "student", f"{config.student.model} ({student_config.model_type})")]
    findings += [
        _special_tokens(config, student, student_config),
        _vocabulary_padding(config, student),
    ]
    context = context_tokens(student_config)
    if config.teacher is None or not config.needs_teacher:
        return [*findings, Finding("ok", "context", f"student {context or 'not stated'} tokens")]
    setting = Setting(config, student, context)
    return [
        *findings,
        Finding("ok", "teacher", config.teacher.title),
        *check_teacher(config.teacher, setting),
    ]


def _special_tokens(config: RunConfig, student: Any, student_config: Any) -> Finding:
    settings = config.student
    ids = end_token_ids(
        student_config, load_generation_config(settings.model), student, settings.end_tokens
    )
    end = ", ".join(map(repr, student.convert_ids_to_tokens(list(ids))))
    begin, pad = (
        repr(token) if token else "none" for token in (student.bos_token, student.pad_token)
    )
    return Finding(
        "ok", "special tokens", f"a completion ends with {end}; begin {begin}, pad {pad}"
    )


def _vocabulary_padding(config: RunConfig, student: Any) -> Finding:
    """Sizes may differ: neither model is asked for tokens that the other lacks, but for those that
    the student samples."""
    models = {"student": (config.student.model, len(student))}
    if isinstance(config.teacher, LocalTeacherConfig) and config.needs_teacher:
        models["teacher"] = (config.teacher.model, len(load_tokenizer(config.teacher.model)))
    sizes = {
        who: (num_tokens, load_model_config(name).get_text_config().vocab_size)
        for who, (name, num_tokens) in models.items()
    }
    told = ", ".join(
        f"{who} {num_tokens} tokens in {rows} rows" for who, (num_tokens, rows) in sizes.items()
    )
    return Finding("ok", "vocabulary padding", told)


def _check_task(config: RunConfig) -> list[Finding]:
    with closing(make_task(**config.task.model_dump())) as task:
        require_working_verifier(task)
        return [Finding("ok", "task", f"{task.name}, its verifier judges")]


def _check_held_out(config: RunConfig) -> list[Finding]:
    """Whether problems that measure the student stand among those that train it; of generated ones
    the task sees to that."""
    loop, held_out = (
        config.optimization,
        [config.task, *([config.ood_task] if config.ood_task else [])],
    )
    num_train = (
        -(-loop.num_steps // loop.steps_per_rollout_batch) * config.rollout.prompts_per_batch
    )
    with ExitStack() as made:
        task, *others = [
            made.enter_context(closing(make_task(**settings.model_dump()))) for settings in held_out
        ]
        train = list(finite_problems(task, "train", num_train, seed=config.seed))
        if not train:
            return []
        problems = [
            *finite_problems(task, "validation"),
            *(p for one in (task, *others) for p in finite_problems(one, "test")),
        ]
    seen = find_contamination(train, problems)
    if not seen.num_found:
        message = f"none of {seen.num_held_out} shares {RUN_WORDS} words in a row with any of {seen.num_train} training problems"
        aside = (
            f", apart from phrases that stand in more than {MOST_PROBLEMS} of either"
            if seen.has_phrases
            else ""
        )
        return [Finding("ok", "held-out problems", message + aside)]
    message = (
        f"{seen.num_found} of {seen.num_held_out} stand among the {seen.num_train} training "
        f"problems ({seen.num_same} as they "
        f"are, the others with {RUN_WORDS} words in a row or all of a shorter one), for example "
        f"{seen.example[:120]!r}; take "
        "them out of those."
    )
    return [Finding("error" if seen.num_same else "warning", "held-out problems", message)]


def _try_out(config: RunConfig) -> "Trial":
    """`UserError` also for what torch cannot do: a want of memory, weights that a device or a
    quantisation does not take."""
    import torch

    from rlad.checks.trial import run_trial

    try:
        return run_trial(config)
    except RuntimeError as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        if (
            isinstance(error, torch.OutOfMemoryError)
            or "not enough memory" in reason
            or "can't allocate memory" in reason
        ):
            how = "lower rollout.max_batch_rows or optimization.tokens_per_batch, or take smaller models"
        else:
            how = "change the device, dtype or quantization of student or teacher, or take other models"
            how += f" (it failed at {_place_of(error)})"  # it may be a mistake of ours, too
        raise UserError(f"the models cannot be loaded and run ({reason}); {how}.") from None


def _place_of(error: BaseException) -> str:
    """The last line of rlad's own code on the way to an error."""
    ours = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).is_relative_to(_PACKAGE)
    ]
    return f"{Path(ours[-1].filename).relative_to(_PACKAGE.parent)}:{ours[-1].lineno}"


def _longest_prompt(config: RunConfig) -> int:
    with ExitStack() as tasks:
        tokenizer, ood = load_tokenizer(config.student.model), config.ood_task
        task = tasks.enter_context(closing(make_task(**config.task.model_dump())))
        ood_task = tasks.enter_context(closing(make_task(**ood.model_dump()))) if ood else None
        return longest_prompt(config, task, tokenizer, _context(config), ood_task)


def _context(config: RunConfig) -> int | None:
    return context_tokens(load_model_config(config.student.model))
