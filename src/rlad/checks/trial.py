"""A trial of a run: real steps of its engine on a handful of short completions. Nothing is
written."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import cycle
from types import SimpleNamespace
from typing import Any

from rlad.config.engine import EngineConfig
from rlad.config.run import RunConfig
from rlad.config.teacher import CachedTeacherConfig, PrivilegedTeacherConfig, single_teachers
from rlad.config.types import Section
from rlad.engines.base import StepResult
from rlad.engines.native import make_engine
from rlad.findings import Finding
from rlad.models.student import load_student
from rlad.models.without_weights import load_tokenizer
from rlad.rollouts.prompts import prompt_token_ids
from rlad.rollouts.types import Metrics
from rlad.runs.guards import Watch
from rlad.tasks import Task, make_task
from rlad.tasks.base import Judgement, judged, reward_range
from rlad.tasks.episodes import EpisodeRules, Step, episode_rules
from rlad.teachers.base import Setting
from rlad.teachers.privileged import encoder
from rlad.teachers.several import task_names

NUM_PROMPTS = 4
GROUP_SIZE = 4
MAX_TOKENS = 64
# Below the effect of rounding to bfloat16 on log-probs, two models cannot be distinguished.
SMALL_LOG_RATIO = 0.01
# More than the longest window of a guard.
_NUM_LIKE_THE_TRIAL = 20


@dataclass(frozen=True, slots=True)
class Trial:
    """The results of the trial's steps."""

    num_completions: int
    """completions in each rollout batch"""
    max_tokens: int
    metrics: Metrics
    """metrics of the first step, as in metrics.jsonl"""
    sampler: str
    """the sampler and, if `auto` chose it, the reason"""
    seconds: dict[str, float]
    """seconds of a step on the second rollout batch, by part: generation, teacher, update, ..."""
    device: str = "cpu"
    """the device of the trial"""


def run_trial(config: RunConfig) -> Trial:
    """Load the models and make the steps of two rollout batches.

    Raises `UserError` and `RunFailedError` for everything at which the run itself would stop before
    or in its first steps.
    """
    small = shrunken(config)
    per_batch = small.optimization.steps_per_rollout_batch
    results: list[StepResult] = []

    def after_step(result: StepResult) -> bool:
        results.append(result)
        return len(results) < 2 * per_batch

    # Engine, student, teacher and prompts are the run's own; only sizes and verdicts differ.
    with closing(make_task(**config.task.model_dump())) as task:
        alternating = with_alternating_verdicts(task)
        engine = make_engine(small, load_student(small), alternating, before_work=lambda: None)
        with closing(engine):
            engine.run(after_step)

    by_trl = " in this trial, and TRL in the run" if config.engine.type == "trl" else ""
    # The first batch also loads kernels, so times are taken from the last.
    seconds: dict[str, float] = {}
    for result in results[-per_batch:]:
        for key, value in result.metrics.items():
            if key.startswith("time/") and value > 0:
                part = key.split("/")[1]
                seconds[part] = seconds.get(part, 0.0) + value / per_batch
    return Trial(
        num_completions=small.rollout.prompts_per_batch * small.rollout.group_size,
        max_tokens=small.rollout.max_completion_tokens,
        metrics=results[0].metrics,
        sampler=engine.sampler.description + by_trl,
        seconds=seconds,
        device=str(engine.student.model.device),
    )


@dataclass(frozen=True, slots=True)
class _AlternatingRules(EpisodeRules):
    verdicts: Iterator[Judgement] = field(default_factory=lambda: cycle([judged(True)]))

    @classmethod
    def of(cls, rules: EpisodeRules, verdicts: Iterator[Judgement]) -> "_AlternatingRules":
        return cls(rules.make, rules.max_turns, rules.max_turn_tokens, verdicts=verdicts)

    def judge(self, steps: Sequence[Step]) -> Judgement:
        return next(self.verdicts)


def with_alternating_verdicts(task: Task) -> Any:
    """Return the task with every second completion graded as correct. So all have an advantage and
    reach the teacher, whatever the student can do within a few tokens."""
    verdicts = cycle([judged(True), judged(False)])
    rules = episode_rules(task)
    return SimpleNamespace(
        name=task.name,
        reward_range=reward_range(task),
        episode_rules=rules and _AlternatingRules.of(rules, verdicts),
        problem=task.problem,
        num_problems=task.num_problems,
        judge=lambda problem, completion: next(verdicts),
    )


def shrunken(config: RunConfig) -> RunConfig:
    """Return the run on the native engine, with a handful of short completions per batch and no
    cache around its teacher.

    A batch has at least one prompt of each of several tasks, so that the teacher of each is asked.
    """
    rollout = config.rollout
    per_batch = config.optimization.steps_per_rollout_batch
    num_prompts = max(min(NUM_PROMPTS, rollout.prompts_per_batch), len(task_names(config)))
    sizes = {
        "prompts_per_batch": -(-num_prompts // per_batch) * per_batch,
        "group_size": min(GROUP_SIZE, rollout.group_size),
        "max_completion_tokens": min(MAX_TOKENS, rollout.max_completion_tokens),
    }
    small = {
        "rollout": rollout.model_copy(update=sizes),
        "teacher": without_cache(config.teacher),
        "engine": EngineConfig(),
    }
    return config.model_copy(update=small)


def without_cache(section: Any) -> Any:
    """Return a `[teacher]` section with no cache in it, at any depth."""
    if isinstance(section, CachedTeacherConfig):
        return without_cache(section.teacher)
    if isinstance(section, dict):
        return {key: without_cache(value) for key, value in section.items()}
    if isinstance(section, Section):
        return section.model_copy(update={key: without_cache(value) for key, value in section})
    return section


# --- what it says of the run ----------------------------------------------------------------------


def describe_trial(trial: Trial, config: RunConfig) -> list[Finding]:
    """Return the findings of a trial, one line each."""
    metrics = trial.metrics
    message = (
        f"{trial.num_completions} completions of training prompts, cut at {trial.max_tokens} "
        f"tokens ({metrics['rollout/truncated/frac']:.0%} were), "
        f"{metrics['rollout/completion_tokens/mean']:.0f} tokens on average, every second one "
        f"counted as correct; at most {metrics['memory/peak/bytes'] / 2**30:.2f} GiB were held"
    )
    return [
        Finding("ok", "trial", message),
        Finding("ok", "sampler", trial.sampler),
        *_log_ratio(metrics, config),
        *_thoughts(metrics, config),
        *_gates(metrics, config),
        *_guards(metrics, config),
        _time(trial, config),
        _whole_run(trial, config),
    ]


def _log_ratio(metrics: Metrics, config: RunConfig) -> list[Finding]:
    if "teacher/log_ratio/mean" not in metrics:
        return []
    mean, low, median, high = (
        metrics[f"teacher/log_ratio/{name}"] for name in ("mean", "q05", "q50", "q95")
    )
    subject = "log πS - log πT"
    message = (
        f"mean {mean:+.2f} nats, median {median:+.2f}, nine tenths between {low:+.2f} and "
        f"{high:+.2f}"
    )
    if max(-low, high) >= SMALL_LOG_RATIO:
        return [Finding("ok", subject, message)]
    if all(teacher.type == "ema" for _, teacher in single_teachers(config.teacher)):
        message += ": the moving average begins as the student itself"
        return [Finding("ok", subject, message)]
    what = "the teacher says what the student says, so it changes nothing; is it the same model?"
    return [Finding("warning", subject, f"{message}: {what}")]


def _thoughts(metrics: Metrics, config: RunConfig) -> list[Finding]:
    """Warn if the teacher should think before its answer and the student should not."""
    teacher = config.teacher
    if not isinstance(teacher, PrivilegedTeacherConfig) or not config.needs_teacher:
        return []
    tokenizer = load_tokenizer(config.student.model)
    encode = encoder(teacher, Setting(config, tokenizer, None))
    students = str(
        tokenizer.decode(list(prompt_token_ids(tokenizer, "?", config.rollout)))
    ).rstrip()
    teachers = str(tokenizer.decode(list(encode("?")))).rstrip()
    # A template turns thinking off with an empty thought, or on with a thought that has begun.
    only_student_is_bare = students.endswith("</think>") and not teachers.endswith("</think>")
    only_teacher_thinks = teachers.endswith("<think>") and not students.endswith("<think>")
    if not (only_student_is_bare or only_teacher_thinks):
        return []
    measured = "is not measured by this objective, which compares distributions"
    if "teacher/log_ratio/mean" in metrics:
        measured = f"is {metrics['teacher/log_ratio/mean']:+.2f} nats on average"
    message = (
        "the teacher should think before it answers and the student should not, so it finds the "
        f"student's answers unlikely: log πS - log πT {measured}; give both the same "
        "chat_template_kwargs, such as { enable_thinking = false }"
    )
    return [Finding("warning", "thoughts", message)]


def _gates(metrics: Metrics, config: RunConfig) -> list[Finding]:
    if not config.objective.gates_by_teacher or "objective/gated_positive/frac" not in metrics:
        return []
    message = (
        f"at the first step {metrics['objective/gated_positive/frac']:.0%} of the tokens where the "
        f"advantage is positive, {metrics['objective/gated_negative/frac']:.0%} where it is "
        "negative"
    )
    if "objective/clamped/frac" in metrics:
        message += f"; {metrics['objective/clamped/frac']:.0%} are clamped"
    return [Finding("ok", "gated", message)]


def _guards(metrics: Metrics, config: RunConfig) -> list[Finding]:
    """Return what the run's guards would report if all of its steps were like the first."""
    watch = Watch(config)
    said = []
    for step in range(1, _NUM_LIKE_THE_TRIAL + 1):
        said += watch.see({**metrics, "step": step})
    # The trial itself alternates rewards and cuts completions. Some have only a thought, which a
    # teacher is not shown.
    by_the_trial = ("reward/", "rollout/", "teacher/speaks/")
    metric_of = {name: guard.condition.metric for name, guard in watch.guards.items()}
    return [
        Finding("warning", warning.name.replace("_", " "), warning.message)
        for warning in said
        if not metric_of[warning.name].startswith(by_the_trial)
    ]


def _time(trial: Trial, config: RunConfig) -> Finding:
    """Report how long the trial's steps took, and how much larger the run's steps are at most."""
    rollout = config.rollout
    num_tokens = rollout.prompts_per_batch * rollout.group_size * rollout.max_completion_tokens
    mean_tokens = trial.metrics["rollout/completion_tokens/mean"]
    times_as_many = num_tokens / (trial.num_completions * mean_tokens)
    parts = ", ".join(
        f"{part.replace('_', ' ')} {seconds:.1f}"
        for part, seconds in trial.seconds.items()
        if seconds >= 0.05
    )
    message = (
        f"a step of the trial took {sum(trial.seconds.values()):.1f} s ({parts}); one of the run "
        f"has up to {times_as_many:.0f} times as many tokens"
    )
    return Finding("ok", "time", message)


def _whole_run(trial: Trial, config: RunConfig) -> Finding:
    """Estimate how long the run takes if completions stay as long as the trial's, and if all are as
    long as allowed. Time is taken as proportional to tokens (on a GPU it grows less)."""
    rollout = config.rollout
    loop = config.optimization
    measured = config.evaluation
    longest = rollout.max_completion_tokens
    # The trial's seconds are for a step, but its tokens are for a whole rollout batch.
    mean_tokens = trial.metrics["rollout/completion_tokens/mean"]
    num_tokens = trial.num_completions * mean_tokens
    times_as_many = rollout.prompts_per_batch * rollout.group_size * longest / num_tokens
    training = loop.num_steps * times_as_many * sum(trial.seconds.values())
    writing = trial.seconds.get("generation", 0.0) * loop.steps_per_rollout_batch
    per_written_token = writing / num_tokens
    num_validations = 1 + -(-loop.num_steps // measured.every_steps)
    num_evaluated = num_validations * (
        measured.num_validation_problems * measured.num_validation_samples
    )
    num_evaluated += 2 * measured.num_test_problems * measured.num_test_samples
    if measured.ood_task:
        num_evaluated += 2 * measured.num_ood_problems * measured.num_test_samples
    evaluating = num_evaluated * longest * per_written_token
    hours = "GPU hours" if trial.device.startswith("cuda") else "hours on the CPU"
    most = training + evaluating
    message = (
        f"{_shown_hours(most * mean_tokens / longest)} {hours} if completions have "
        f"{mean_tokens:.0f} tokens, as the trial's, at most {_shown_hours(most)} if each has "
        f"{longest}: {_shown_hours(training)} for {loop.num_steps} steps, "
        f"{_shown_hours(evaluating)} for {num_validations} validations and the tests before and "
        "after"
    )
    return Finding("ok", "whole run", message)


def _shown_hours(seconds: float) -> str:
    hours = seconds / 3600
    return f"{hours:.0f}" if hours >= 10 else f"{hours:.2g}"
