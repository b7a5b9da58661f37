"""`rlad check`: what a config will do and whether it can, without training and without loading weights."""

import json
import os
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.text import Text
from transformers import AutoModelForCausalLM, PretrainedConfig

from rlad.catalogue import describe
from rlad.config import TRAINED_BY_TRL, OptimizationConfig, RunConfig
from rlad.config_file import changed_settings
from rlad.console import printable
from rlad.engines.trl_distillation import require_one_vocabulary, require_trl_version
from rlad.language_model import (
    context_tokens,
    end_token_ids,
    load_model_config,
    load_tokenizer,
    pick_device,
    require_weights,
)
from rlad.objectives import OBJECTIVES
from rlad.preparation import longest_prompt, require_working_verifier
from rlad.run_dir import RunDirectory
from rlad.tasks import make_task
from rlad.teacher_config import (
    CachedTeacherConfig,
    EMATeacherConfig,
    LocalTeacherConfig,
    PrivilegedTeacherConfig,
    SeveralTeachersConfig,
)
from rlad.teachers import Setting, check_teacher
from rlad.teachers.compatibility import Finding

Result = TypeVar("Result")
_GIB = 1024**3
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_MARKS = {"ok": ("✓", "green"), "warning": ("!", "yellow"), "error": ("✗", "red")}


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes; activations are a rule of thumb, the rest is counted."""

    student_weights: int
    gradients_and_optimizer: int
    teacher_weights: int
    reference_weights: int
    sampler_cache: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


@dataclass(frozen=True, slots=True)
class CheckReport:
    config: RunConfig
    plan: list[str]
    findings: list[Finding]
    memory: MemoryEstimate | None

    @property
    def errors(self) -> list[Finding]:
        return _errors(self.findings)

    def to_json(self) -> dict[str, Any]:
        return {
            "ok": not self.errors,
            "config": self.config.model_dump(mode="json"),
            "plan": self.plan,
            "findings": [asdict(finding) for finding in self.findings],
            "memory_bytes": None if self.memory is None else asdict(self.memory) | {"total": self.memory.total},
        }


def _errors(findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.level == "error"]


def check_run(config: RunConfig) -> CheckReport:
    """Everything that can be known before weights are loaded. What cannot work is an `error` among the findings."""
    findings: list[Finding] = []

    def attempt(subject: str, check: Callable[[RunConfig], Result]) -> Result | None:
        try:
            return check(config)
        except ValueError as error:
            findings.append(Finding("error", subject, str(error)))
            return None

    findings += attempt("run directory", _check_run_dir) or []
    findings += attempt("device", _check_devices) or []
    findings += attempt("packages", _check_packages) or []
    findings += attempt("models", _check_models) or []
    findings += attempt("task", _check_task) or []
    memory = None
    if not _errors(findings) and (prompt_tokens := attempt("prompts", _longest_prompt)):
        needed, context = prompt_tokens + config.rollout.max_completion_tokens, _context(config) or "unlimited"
        message = f"the longest has {prompt_tokens} tokens, with its completion {needed} of {context}"
        memory = estimate_memory(config, prompt_tokens)
        findings += [Finding("ok", "prompts", message), _compare_memory(memory, pick_device(config.student.device))]
    return CheckReport(config, describe_plan(config), findings, memory)


_TEACHER_WORK = {
    "grpo": "no teacher",
    "opd_then_grpo": "the teacher scores each sampled token once in the steps with opd, later nothing",
    "sft": "the teacher writes all completions before the first step",
    "gkd": "the teacher computes the full vocabulary's probabilities at each sampled token",
}


def describe_plan(config: RunConfig) -> list[str]:
    """What a step computes, one line each."""
    rollout, loop, row = config.rollout, config.optimization, OBJECTIVES.get(config.objective.type)
    num_rollouts = rollout.prompts_per_batch * rollout.group_size
    plan = [
        f"{loop.num_steps} optimiser steps, {loop.steps_per_rollout_batch} on each batch of {num_rollouts} rollouts "
        f"({rollout.prompts_per_batch} prompts x {rollout.group_size})",
        *describe("objectives", config.objective.type).partition("\n\n[")[0].splitlines(),
        _TEACHER_WORK.get(config.objective.type, "the teacher scores each sampled token once"),
    ]
    if loop.kl_coef:
        plan.append("the initial student scores each sampled token once (KL leash)")
    if loop.steps_per_rollout_batch > 1:
        plan.append("the old policy scores each sampled token once (several steps on one rollout batch)")
    if row and row.zero_advantage_is_zero_gradient and not loop.kl_coef:
        plan.append("completions of advantage 0 are left out of scoring and update: they contribute exactly nothing")
    return plan


def _check_run_dir(config: RunConfig) -> list[Finding]:
    run = RunDirectory(config.directory)
    if run.exists():
        message = f"{run.path} holds a run already: train needs --resume, --overwrite or another run_dir"
        return [Finding("warning", "run directory", message)]
    run.require_free(overwrite=False)
    parent = next(p for p in (run.path.absolute(), *run.path.absolute().parents) if p.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        return [Finding("error", "run directory", f"{run.path} cannot be made in {parent}; choose another run_dir.")]
    return [Finding("ok", "run directory", f"{run.path} is free")]


def _check_devices(config: RunConfig) -> list[Finding]:
    devices = {"student": config.student.device}
    if isinstance(config.teacher, LocalTeacherConfig):
        devices["teacher"] = config.teacher.device
    picked = {who: pick_device(device) for who, device in devices.items()}
    return [Finding("ok", "device", ", ".join(f"{who} {device}" for who, device in picked.items()))]


def _check_packages(config: RunConfig) -> list[Finding]:
    if config.objective.type not in TRAINED_BY_TRL:
        return []
    require_trl_version(config.objective.type)
    findings = [Finding("ok", "packages", "TRL is installed")]
    default, loop = OptimizationConfig(), config.optimization
    if (loop.aggregation, loop.advantage_scale) != (default.aggregation, default.advantage_scale):
        message = (
            f"optimization.aggregation and advantage_scale mean nothing to {config.objective.type!r}: TRL averages over tokens"
        )
        findings.append(Finding("warning", "packages", message))
    return findings


def _check_models(config: RunConfig) -> list[Finding]:
    student, student_config = load_tokenizer(config.student.model), load_model_config(config.student.model)
    require_weights(config.student.model)
    end = ", ".join(map(repr, student.convert_ids_to_tokens(list(end_token_ids(student_config, None, student)))))
    if config.objective.type == "gkd" and isinstance(config.teacher, LocalTeacherConfig):
        teacher_config = load_model_config(config.teacher.model)
        require_one_vocabulary(student_config.get_text_config().vocab_size, teacher_config.get_text_config().vocab_size)
    findings = [Finding("ok", "student", f"{config.student.model} ({student_config.model_type}), ends with {end}")]
    context = context_tokens(student_config)
    if config.teacher is None or not config.needs_teacher:
        return [*findings, Finding("ok", "context", f"student {context or 'not stated'} tokens")]
    setting = Setting(config, student, context)
    return [*findings, Finding("ok", "teacher", config.teacher.title), *check_teacher(config.teacher, setting)]


def _check_task(config: RunConfig) -> list[Finding]:
    with closing(make_task(**config.task.model_dump())) as task:
        require_working_verifier(task)
        return [Finding("ok", "task", f"{task.name}, its verifier judges")]


def _longest_prompt(config: RunConfig) -> int:
    with ExitStack() as tasks:
        tokenizer, ood = load_tokenizer(config.student.model), config.ood_task
        task = tasks.enter_context(closing(make_task(**config.task.model_dump())))
        ood_task = tasks.enter_context(closing(make_task(**ood.model_dump()))) if ood else None
        return longest_prompt(config, task, tokenizer, _context(config), ood_task)


def _context(config: RunConfig) -> int | None:
    return context_tokens(load_model_config(config.student.model))


def estimate_memory(config: RunConfig, prompt_tokens: int) -> MemoryEstimate:
    """Weights are float32 for the student (AdamW: weight, gradient and two moments are 16 bytes a parameter).

    Activations: about 34 bytes x hidden size a token and layer in 16 bit (arXiv 2205.05198, without the attention matrix),
    twice that in float32; with gradient checkpointing one layer's, plus the layer inputs.
    """
    rollout, loop = config.rollout, config.optimization
    num_parameters, shape = _count_parameters(config.student.model)
    layers, hidden, width = shape.num_hidden_layers, shape.hidden_size, _BYTES[config.student.dtype]
    sequence, num_rollouts = prompt_tokens + rollout.max_completion_tokens, rollout.prompts_per_batch * rollout.group_size
    tokens = min(loop.tokens_per_batch, num_rollouts * sequence)
    per_layer = 17 * width * hidden * tokens
    checkpointed = per_layer + width * hidden * layers * tokens
    return MemoryEstimate(
        student_weights=4 * num_parameters,
        gradients_and_optimizer=12 * num_parameters,
        teacher_weights=teacher_bytes(config.teacher, num_parameters) if config.needs_teacher else 0,
        reference_weights=num_parameters * width if loop.kl_coef else 0,
        sampler_cache=min(rollout.max_batch_rows, num_rollouts) * sequence * 2 * layers * _key_size(shape) * width,
        activations=checkpointed if config.student.gradient_checkpointing else per_layer * layers,
        logits=3 * 4 * 256 * shape.vocab_size,
    )


def teacher_bytes(teacher: Any, student_parameters: int) -> int:
    """The weights that a teacher adds to this machine's memory."""
    match teacher:
        case LocalTeacherConfig():
            per_weight = {"none": _BYTES[teacher.dtype], "int8": 1, "int4": 0.5}[teacher.quantization]
            return int(_count_parameters(teacher.model)[0] * per_weight)
        case SeveralTeachersConfig():
            return sum(teacher_bytes(one, student_parameters) for one in teacher.teachers.values())
        case PrivilegedTeacherConfig() | CachedTeacherConfig():
            return teacher_bytes(teacher.teacher, student_parameters)
        case EMATeacherConfig():
            return 0 if teacher.update_rate == 1 else 4 * student_parameters
        case _:  # served elsewhere, or the student's own base model
            return 0


def _key_size(shape: PretrainedConfig) -> int:
    """Numbers in the keys of one token and layer; 0 for models without attention."""
    heads = getattr(shape, "num_attention_heads", None)
    if not heads:
        return 0
    head_size = getattr(shape, "head_dim", None) or shape.hidden_size // heads
    return (getattr(shape, "num_key_value_heads", None) or heads) * head_size


def _count_parameters(name: str) -> tuple[int, PretrainedConfig]:
    """Number of parameters (tied ones once) and the text config, from the model's config alone."""
    config = load_model_config(name)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise ValueError(f"{name!r} is no causal language model ({str(error).splitlines()[0]}); give one.") from None
    return sum(parameter.numel() for parameter in model.parameters()), config.get_text_config()


def _compare_memory(memory: MemoryEstimate, device: torch.device) -> Finding:
    if device.type == "cuda":
        available = torch.cuda.mem_get_info(device)[1]
    else:
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    parts = ", ".join(f"{name.replace('_', ' ')} {size / _GIB:.2f}" for name, size in asdict(memory).items() if size)
    message = f"about {memory.total / _GIB:.2f} of {available / _GIB:.1f} GiB ({parts})"
    if memory.total <= available:
        return Finding("ok", "memory", message)
    what = "lower optimization.tokens_per_batch or rollout.max_batch_rows, or set student.gradient_checkpointing = true"
    return Finding("warning", "memory", f"{message}; {what}")


def print_report(report: CheckReport, console: Console | None = None) -> None:
    """One screen: what differs from the defaults, what will be computed, findings."""
    console = console or Console(highlight=False)

    def line(text: str, style: str = "") -> None:
        console.print(Text(printable(text), style=style), soft_wrap=True)

    line("settings (all others have their defaults; --json prints them all)", style="bold")
    for key, value in changed_settings(report.config).items():
        line(f"  {key} = {json.dumps(value, ensure_ascii=False)}")
    line("\nwhat will be computed", style="bold")
    for text in report.plan:
        line(f"  {text}")
    line("\nchecks", style="bold")
    for finding in report.findings:
        mark, colour = _MARKS[finding.level]
        line(f"  {mark} {finding.subject}: {finding.message}", style="" if finding.level == "ok" else colour)
    if report.errors:
        line("\nthis cannot work: mend what is marked with ✗", style="bold red")
    else:
        line("\nthis can be trained", style="bold green")
