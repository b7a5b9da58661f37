"""`rlad check`: find out what a config will do and whether it can run, without training."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

from rlad.checks.contamination import MOST_PROBLEMS, RUN_WORDS, find_contamination, finite_problems
from rlad.checks.episodes import check_episodes
from rlad.checks.memory import (
    MemoryEstimate,
    compare_memory,
    estimate_memory,
    free_and_total_memory,
)
from rlad.checks.pass_rates import PassRates, check_pass_rates
from rlad.checks.prompts import check_first_prompt
from rlad.checks.ranking import RankedContext, describe_ranking, rank_contexts
from rlad.checks.trial import Trial, describe_trial, run_trial
from rlad.config.catalogue import describe
from rlad.config.run import RunConfig
from rlad.config.teacher import LocalTeacherConfig, single_teachers
from rlad.engines.making import require_engine_package, require_pictures_fit
from rlad.errors import RladError, UserError, out_of_memory
from rlad.findings import Finding
from rlad.models.files import require_weights
from rlad.models.loading import pick_device
from rlad.models.student import require_base_model
from rlad.models.without_weights import (
    context_tokens,
    end_token_ids,
    load_generation_config,
    load_model_config,
    load_tokenizer,
    load_vision,
    unused_generation_settings,
)
from rlad.rollouts.prompts import longest_prompt
from rlad.rollouts.turns import require_continuable_prompts
from rlad.rollouts.vllm_protocol import Needs, require_usable
from rlad.rollouts.vllm_server import make_client
from rlad.runs.directory import RunDirectory
from rlad.tasks import Task, make_task
from rlad.tasks.episodes import episode_rules
from rlad.tasks.references import require_working_verifier
from rlad.tasks.scenes import Scenes, blind_accuracy
from rlad.teachers import check_teacher
from rlad.teachers.base import Setting
from rlad.training.notes import notes_on

Result = TypeVar("Result")


NUM_BLIND_PROBLEMS = 200


@dataclass(slots=True)
class CheckReport:
    """The findings of a check so far."""

    config: RunConfig
    plan: list[str]
    findings: list[Finding] = field(default_factory=list)
    memory: MemoryEstimate | None = None
    trial: Trial | None = None
    """None if an earlier check found an error, or no models should be loaded"""
    ranking: list[RankedContext] = field(default_factory=list)
    """empty unless requested"""
    pass_rates: PassRates | None = None
    """None unless requested"""

    @property
    def errors(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.level == "error"]

    def attempt(self, subject: str, check: Callable[..., Result], *arguments: Any) -> Result | None:
        """Return the result of a check. A `UserError` that it raises becomes an error among the
        findings."""
        try:
            return check(*arguments)
        except (RladError, RuntimeError) as error:
            failure = error if isinstance(error, RladError) else out_of_memory(error)
            if failure is None:
                raise
            self.findings.append(Finding("error", subject, str(failure)))
            return None

    def to_json(self) -> dict[str, Any]:
        memory = self.memory
        return {
            "ok": not self.errors,
            "config": self.config.model_dump(mode="json"),
            "plan": self.plan,
            "findings": [asdict(finding) for finding in self.findings],
            "memory_bytes": asdict(memory) | {"total": memory.total} if memory else None,
            "trial": asdict(self.trial) if self.trial else None,
            "ranking": [one.to_json() for one in self.ranking],
            "pass_rates": asdict(self.pass_rates) if self.pass_rates else None,
        }


def check_run(
    config: RunConfig,
    *,
    with_models: bool = True,
    for_verl: bool = False,
    num_ranked_problems: int = 0,
    num_solved_problems: int = 0,
    force: bool = False,
) -> CheckReport:
    """Check everything that can be known before weights are loaded, then make a trial with the
    models. Nothing is written.

    With `force` an estimate beyond the free memory is only a warning, and the trial is made.
    `for_verl` also checks whether verl knows our objectives. `num_ranked_problems` also checks
    whether the teacher ranks the completions of that many problems as the verifier does.
    `num_solved_problems` also measures how many of that many problems student and teacher solve,
    and shows the nearest measured cases. What cannot work is an `error` among the findings.
    """
    report = CheckReport(config, describe_plan(config))
    if for_verl:
        from rlad.engines.verl.check import check_verl

        report.findings += check_verl()
    for subject, check in _CHECKS.items():
        if subject == "held-out problems" and any(one.subject == "task" for one in report.errors):
            continue  # it would report the same again
        report.findings += report.attempt(subject, check, config) or []
    # Each stage needs results of earlier ones: prompts need a tokenizer and a task, memory needs
    # the longest prompt, and a trial needs memory for the models.
    if not report.errors and (prompts := report.attempt("prompts", _check_prompts, config)):
        num_tokens, findings = prompts
        report.findings += findings
        report.memory = report.attempt("memory", estimate_memory, config, num_tokens)
    if report.memory is not None:
        free, total = free_and_total_memory(str(pick_device(config.student.device)))
        finding = compare_memory(report.memory, free=free, total=total)
        if force and finding.level == "error":
            finding = replace(finding, level="warning")
        report.findings.append(finding)
    if with_models and not report.errors:
        _check_with_models(report, num_ranked_problems, num_solved_problems)
    return report


def _check_with_models(
    report: CheckReport, num_ranked_problems: int, num_solved_problems: int
) -> None:
    """Make the trial, and measure what else was requested."""
    config = report.config
    report.trial = report.attempt("trial", run_trial, config)
    if report.trial is None:
        return
    report.findings += describe_trial(report.trial, config)
    if num_ranked_problems:
        ranked = report.attempt("ranking", rank_contexts, config, num_ranked_problems)
        report.ranking = ranked or []
        report.findings += map(describe_ranking, report.ranking)
    if num_solved_problems:
        found = report.attempt("nearest case", check_pass_rates, config, num_solved_problems)
        report.pass_rates, findings = found or (None, [])
        report.findings += findings


def describe_plan(config: RunConfig) -> list[str]:
    """Describe what a step computes, one line each."""
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
            f"{run.path} already has a run: train needs --resume, --overwrite or another run_dir"
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


def _check_engine(config: RunConfig) -> list[Finding]:
    require_engine_package(config)
    if config.engine.type == "native":
        return []
    from rlad.engines.trl.arguments import describe_arguments

    return [Finding("ok", "engine", describe_arguments(config))]


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
        *_servers(config, model_config),
    ]
    if unused := unused_generation_settings(settings.model):
        message = (
            f"{', '.join(unused)} of its generation_config.json: not used in training and "
            "evaluation, and not kept in checkpoints and exports"
        )
        findings.append(Finding("ok", "generation", message))
    if config.teacher is None or not config.needs_teacher:
        return [*findings, Finding("ok", "context", f"student {context or 'not stated'} tokens")]
    return [
        *findings,
        Finding("ok", "teacher", config.teacher.title),
        *check_teacher(config.teacher, Setting(config, tokenizer, context)),
    ]


def _servers(config: RunConfig, model_config: Any) -> list[Finding]:
    """Check whether the run's vLLM servers can sample."""
    rollout = config.rollout
    if not rollout.vllm.urls:
        return []
    needs = Needs.of(rollout, model_config, config.student.dtype)
    with closing(make_client(rollout)) as client:
        versions = [require_usable(client, url, needs).version for url in rollout.vllm.urls]
    return [
        Finding("ok", "sampler", f"vLLM {', '.join(versions)} at {', '.join(rollout.vllm.urls)}")
    ]


def _special_tokens(config: RunConfig, tokenizer: Any, model_config: Any) -> Finding:
    settings = config.student
    generation = load_generation_config(settings.model)
    ids = end_token_ids(model_config, generation, tokenizer, settings.end_tokens)
    end = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(list(ids))))
    message = (
        f"a completion ends with {end}; begin {tokenizer.bos_token!r}, pad {tokenizer.pad_token!r}"
    )
    return Finding("ok", "special tokens", message)


@contextmanager
def _tasks(config: RunConfig) -> Iterator[list[Task]]:
    """Open the task of a run, and after it the out-of-distribution task if there is one."""
    sections = [section for section in (config.task, config.ood_task) if section is not None]
    with ExitStack() as held:
        yield [
            held.enter_context(closing(make_task(**section.model_dump()))) for section in sections
        ]


def _check_task(config: RunConfig) -> list[Finding]:
    with closing(make_task(**config.task.model_dump())) as task:
        rules = episode_rules(task)
        if rules is not None:
            return check_episodes(task, rules, seed=config.seed)
        return [
            Finding("warning", "task", f"{grades.message}.")
            if grades.message
            else Finding(
                "ok",
                "task",
                f"{grades.name}, its verifier judges: {grades.num_correct} of "
                f"{grades.num_problems} reference answers are correct for their own problems"
                + (
                    f" ({grades.num_planned} were to be graded; it is slow)"
                    if grades.num_problems < grades.num_planned
                    else ""
                ),
            )
            for grades in require_working_verifier(task)
        ] + _check_pictures(task)


def _check_pictures(task: Task) -> list[Finding]:
    """Measure how many questions about drawn scenes can be answered without seeing them."""
    if not isinstance(task, Scenes):
        return []
    share = blind_accuracy(task, num_problems=NUM_BLIND_PROBLEMS)
    message = (
        f"without its picture, the commonest answer of each question is right for {share:.0%} of "
        f"{NUM_BLIND_PROBLEMS} test problems"
    )
    return [Finding("ok", "blind baseline", message)]


def _check_held_out(config: RunConfig) -> list[Finding]:
    """Check whether held-out problems are among the training problems. Tasks that generate problems
    ensure disjoint splits themselves."""
    # Only problems that this run will see: it may end before the end of its training set.
    num_train = config.optimization.num_rollout_batches * config.rollout.prompts_per_batch
    with _tasks(config) as tasks:
        num_in_all = tasks[0].num_problems("train")
        train = list(finite_problems(tasks[0], "train", num_train, seed=config.seed))
        if not train:
            return []
        held_out = list(finite_problems(tasks[0], "validation"))
        for task in tasks:
            held_out += finite_problems(task, "test")
    seen = find_contamination(train, held_out)
    subject = "held-out problems"
    that_are_asked = ""
    if num_in_all is not None and seen.num_train < num_in_all:
        that_are_asked = f" that this run asks (of {num_in_all})"
    if not seen.num_found:
        message = (
            f"none of {seen.num_held_out} shares {RUN_WORDS} words in a row with any of "
            f"{seen.num_train} training problems{that_are_asked}"
        )
        if seen.has_phrases:
            message += f", apart from phrases that are in more than {MOST_PROBLEMS} of either"
        return [Finding("ok", subject, message)]
    message = (
        f"{seen.num_found} of {seen.num_held_out} are among the {seen.num_train} training "
        f"problems{that_are_asked} ({seen.num_same} as they are, the others with {RUN_WORDS} words "
        f"in a row or all of a shorter one), for example {seen.example[:120]!r}; remove them from "
        "those."
    )
    return [Finding("error" if seen.num_same else "warning", subject, message)]


_CHECKS: dict[str, Callable[[RunConfig], list[Finding]]] = {
    "run directory": _check_run_dir,
    "device": _check_devices,
    "engine": _check_engine,
    "trackers": _check_trackers,
    "models": _check_models,
    "task": _check_task,
    "held-out problems": _check_held_out,
}


def _check_prompts(config: RunConfig) -> tuple[int, list[Finding]]:
    """Return the length of the longest prompt in tokens, with findings about it."""
    context = context_tokens(load_model_config(config.student.model))
    with _tasks(config) as (task, *others):
        require_pictures_fit(config, task)
        tokenizer = load_tokenizer(config.student.model)
        ood_task = others[0] if others else None
        require_continuable_prompts(task, tokenizer, config.rollout)
        vision = load_vision(config.student.model, tokenizer)
        num_tokens = longest_prompt(config, task, tokenizer, context, ood_task, vision)
        first = check_first_prompt(config, task, tokenizer, vision)
        first += [Finding("warning", "settings", note) for note in notes_on(config, task, ood_task)]
    needed = num_tokens + config.rollout.max_completion_tokens
    message = (
        f"the longest has {num_tokens} tokens, with its completion {needed} of "
        f"{context or 'unlimited'}"
    )
    return num_tokens, [Finding("ok", "prompts", message), *first]
