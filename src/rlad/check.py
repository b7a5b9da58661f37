"""`rlad check`: what a config will do and whether it can, without training and without loading weights."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM

from rlad.config import RunConfig
from rlad.config_file import dump_config
from rlad.engines.native import check_prompt_length
from rlad.language_model import EMBEDDED, context_tokens, load_tokenizer, pick_device
from rlad.objectives import OBJECTIVES
from rlad.prompts import prompt_token_ids
from rlad.tasks import make_task
from rlad.teachers.compatibility import Finding, compare_tokenizers

NUM_PROBED_PROBLEMS = 20
_GIB = 1024**3
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_MARKS = {"ok": "[green]✓[/]", "warning": "[yellow]![/]", "error": "[red]✗[/]"}


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes; activations are a rule of thumb, the rest is counted."""

    student_weights: int
    gradients_and_optimizer: int
    teacher_weights: int
    reference_weights: int
    activations: int
    logprobs: int

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
        return [finding for finding in self.findings if finding.level == "error"]

    def to_json(self) -> dict[str, Any]:
        return {
            "ok": not self.errors,
            "config": self.config.model_dump(mode="json"),
            "plan": self.plan,
            "findings": [asdict(finding) for finding in self.findings],
            "memory_bytes": None if self.memory is None else asdict(self.memory) | {"total": self.memory.total},
        }


def check_run(config: RunConfig) -> CheckReport:
    """Everything that can be known before weights are loaded. What cannot work is an `error` among the findings."""
    findings: list[Finding] = []
    for check in (_check_devices, _check_models, _check_task):
        try:
            findings += check(config)
        except ValueError as error:
            findings.append(Finding("error", check.__name__.removeprefix("_check_"), str(error)))
    memory = None if any(f.level == "error" and f.subject == "models" for f in findings) else estimate_memory(config)
    return CheckReport(config, describe_plan(config), findings, memory)


def describe_plan(config: RunConfig) -> list[str]:
    """What a step computes, one line each."""
    rollout, loop, row = config.rollout, config.optimization, OBJECTIVES[config.objective.type]
    num_rollouts = rollout.prompts_per_batch * rollout.group_size
    plan = [
        f"{loop.num_steps} optimiser steps, {loop.steps_per_rollout_batch} on each batch of {num_rollouts} rollouts "
        f"({rollout.prompts_per_batch} prompts x {rollout.group_size})",
        f"objective {config.objective.type} ({row.paper}): " + "; ".join(row.formula.splitlines()),
        f"the teacher scores {'each sampled token once' if row.needs_teacher else 'nothing'}",
    ]
    if loop.kl_coef:
        plan.append("the initial student scores each sampled token once (KL leash)")
    if loop.steps_per_rollout_batch > 1:
        plan.append("the old policy scores each sampled token once (several steps on one rollout batch)")
    if row.zero_advantage_is_zero_gradient and not loop.kl_coef:
        plan.append("completions of advantage 0 are left out of scoring and update (they contribute exactly nothing)")
    return plan


def _check_devices(config: RunConfig) -> list[Finding]:
    devices = {"student": config.student.device} | ({"teacher": config.teacher.device} if config.teacher else {})
    return [Finding("ok", f"{who} device", str(pick_device(device))) for who, device in devices.items()]


def _check_models(config: RunConfig) -> list[Finding]:
    student = load_tokenizer(config.student.model)
    context = context_tokens(config.student.model)
    findings = [Finding("ok", "context", f"the student's context is {context or 'not stated'} tokens")]
    if config.teacher is not None and OBJECTIVES[config.objective.type].needs_teacher:
        findings += compare_tokenizers(student, load_tokenizer(config.teacher.model))
    return findings


def _check_task(config: RunConfig) -> list[Finding]:
    tokenizer, context = load_tokenizer(config.student.model), context_tokens(config.student.model)
    task = make_task(**config.task.model_dump())
    try:
        longest = 0
        for split in ("train", "validation", "test"):
            for i in range(min(NUM_PROBED_PROBLEMS, task.num_problems(split) or NUM_PROBED_PROBLEMS)):
                prompt = prompt_token_ids(tokenizer, task.problem(split, i).prompt, config.rollout.prompt_format)
                check_prompt_length(len(prompt), f"{split} problem {i}", config, context)
                longest = max(longest, len(prompt))
    finally:
        task.close()
    return [Finding("ok", "task", f"{config.task.type}: longest of {NUM_PROBED_PROBLEMS} prompts a split is {longest} tokens")]


def estimate_memory(config: RunConfig) -> MemoryEstimate:
    """Weights are float32 for the student (AdamW: weight, gradient and two moments are 16 bytes a parameter).

    Activations: about 34 bytes x hidden size a token and layer in 16 bit (arXiv 2205.05198, without the attention matrix), twice that
    in float32; with gradient checkpointing one layer's, plus the layer inputs.
    """
    num_parameters, shape = _count_parameters(config.student.model)
    teacher = config.teacher
    teacher_parameters = _count_parameters(teacher.model)[0] if teacher is not None else 0
    width = 2 if config.student.dtype == "float32" else 1
    per_layer = 34 * shape.hidden_size * width * config.optimization.tokens_per_batch
    inputs = 2 * width * shape.hidden_size * shape.num_hidden_layers * config.optimization.tokens_per_batch
    checkpointed = config.student.gradient_checkpointing
    return MemoryEstimate(
        student_weights=4 * num_parameters,
        gradients_and_optimizer=12 * num_parameters,
        teacher_weights=teacher_parameters * _BYTES[teacher.dtype] if teacher is not None else 0,
        reference_weights=num_parameters * _BYTES[config.student.dtype] if config.optimization.kl_coef else 0,
        activations=per_layer + inputs if checkpointed else per_layer * shape.num_hidden_layers,
        logprobs=3 * 4 * 256 * shape.vocab_size,
    )


def _count_parameters(name: str) -> tuple[int, Any]:
    """Number of parameters (tied ones once) and the text config, from the model's config alone."""
    config = AutoConfig.from_pretrained(EMBEDDED.get(name, name))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters()), config.get_text_config()


def print_report(report: CheckReport, console: Console | None = None) -> None:
    """One screen: resolved config, plan, findings, memory."""
    console = console or Console(highlight=False)
    console.print(dump_config(report.config), markup=False)
    console.rule("what will be computed", style="dim")
    for line in report.plan:
        console.print(f"- {line}", markup=False)
    console.rule("checks", style="dim")
    for finding in report.findings:
        console.print(_MARKS[finding.level], f"{finding.subject}:", end=" ")
        console.print(finding.message, markup=False)
    if report.memory is not None:
        console.rule("memory estimate", style="dim")
        parts = ", ".join(f"{name.replace('_', ' ')} {size / _GIB:.2f}" for name, size in asdict(report.memory).items() if size)
        console.print(f"{report.memory.total / _GIB:.2f} GiB, without the sampler's cache: {parts}", markup=False)
