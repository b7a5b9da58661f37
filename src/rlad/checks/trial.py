"""A trial of a run: a few real steps of its engine on a handful of short completions, of which
nothing is written.

The student's steps happen in memory, and a cached teacher is asked past its cache.
"""

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

from rlad.config.run import RunConfig
from rlad.config.teacher import (
    CachedTeacherConfig,
    PrivilegedTeacherConfig,
    SeveralTeachersConfig,
    single_teachers,
)
from rlad.engines.base import StepResult
from rlad.engines.native import make_engine
from rlad.findings import Finding
from rlad.models.loading import LanguageModel
from rlad.models.student import load_student
from rlad.rollouts.grading import graded_groups
from rlad.rollouts.types import Metrics
from rlad.runs.guards import Watch
from rlad.seeds import stream_seed
from rlad.tasks import Problem, Split, Task, make_task
from rlad.tasks.base import Judgement, judged
from rlad.teachers.several import task_names

NUM_PROMPTS = 4
GROUP_SIZE = 4
MAX_TOKENS = 64
# Below what rounding to bfloat16 moves log-probs by, two models cannot be told apart.
SMALL_LOG_RATIO = 0.01
# Tokens after the first that each row is decoded for, to time the run's own batch size.
_NUM_TIMED_TOKENS = 8
# More than the longest window of a guard.
_NUM_LIKE_THE_TRIAL = 20
_GIB = 1024**3


@dataclass(frozen=True, slots=True)
class StepTime:
    """Of one optimiser step, evaluation left out, if all completions have so many tokens."""

    completion_tokens: float
    seconds: dict[str, float]
    """by part: generation, teacher, update and the like"""

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


@dataclass(frozen=True, slots=True)
class Trial:
    num_completions: int
    max_tokens: int
    num_truncated: int
    mean_tokens: float
    metrics: Metrics
    """of the first step, as metrics.jsonl has them"""
    steps: tuple[StepTime, ...]
    """completions as long as the trial's, and as long as allowed"""

    def to_json(self) -> dict[str, Any]:
        steps = [asdict(step) | {"total": step.total} for step in self.steps]
        return asdict(self) | {"steps": steps}


# --- the steps ------------------------------------------------------------------------------------


class AlternatingVerdicts:
    """A task whose every second completion is correct, so that all have an advantage and reach the
    teacher, whatever the student can do within a few tokens."""

    def __init__(self, task: Task):
        self.task = task
        self.name = task.name
        self._is_correct = False

    def problem(self, split: Split, index: int, *, seed: int = 0) -> Problem:
        return self.task.problem(split, index, seed=seed)

    def num_problems(self, split: Split) -> int | None:
        return self.task.num_problems(split)

    def judge(self, problem: Problem, completion: str) -> Judgement:
        self._is_correct = not self._is_correct
        return judged(self._is_correct)

    def close(self) -> None:
        self.task.close()


def run_trial(config: RunConfig) -> Trial:
    """Load the models and make the steps of two rollout batches.

    Raises `UserError` and `RunFailedError` for whatever the run itself would stop at before or in
    its first steps.
    """
    small = shrunken(config)
    per_batch = small.optimization.steps_per_rollout_batch
    results: list[StepResult] = []

    def after_step(result: StepResult) -> bool:
        results.append(result)
        return len(results) < 2 * per_batch

    # The run's own engine, student, teacher and prompts; only sizes and verdicts differ.
    with closing(AlternatingVerdicts(make_task(**config.task.model_dump()))) as task:
        engine = make_engine(small, load_student(small), task, before_work=lambda: None)
        with closing(engine):
            engine.run(after_step)
            decoding = decoding_seconds(config, engine.student, task)
    # The first batch also loads kernels, so times are those of the last.
    batch = results[-per_batch:]
    rollouts = [
        rollout for result in batch for group in result.groups for rollout in group.rollouts
    ]
    lengths = [len(rollout.completion.token_ids) for rollout in rollouts]
    return Trial(
        num_completions=len(rollouts),
        max_tokens=small.rollout.max_completion_tokens,
        num_truncated=sum(rollout.completion.is_truncated for rollout in rollouts),
        mean_tokens=sum(lengths) / len(lengths),
        metrics=results[0].metrics,
        steps=_step_times(config, batch, decoding),
    )


def shrunken(config: RunConfig) -> RunConfig:
    """Return the run with a handful of short completions in a batch and no cache around its
    teacher.

    Several tasks take turns: at least one prompt of each, so that the teacher of each is asked.
    """
    rollout = config.rollout
    per_batch = config.optimization.steps_per_rollout_batch
    num_prompts = max(min(NUM_PROMPTS, rollout.prompts_per_batch), len(task_names(config)))
    sizes = {
        "prompts_per_batch": -(-num_prompts // per_batch) * per_batch,
        "group_size": min(GROUP_SIZE, rollout.group_size),
        "max_completion_tokens": min(MAX_TOKENS, rollout.max_completion_tokens),
    }
    return config.model_copy(
        update={
            "rollout": rollout.model_copy(update=sizes),
            "teacher": without_cache(config.teacher),
        }
    )


def without_cache(teacher: Any) -> Any:
    """Return a `[teacher]` section with no cache in it."""
    match teacher:
        case CachedTeacherConfig():
            return without_cache(teacher.teacher)
        case PrivilegedTeacherConfig():
            return teacher.model_copy(update={"teacher": without_cache(teacher.teacher)})
        case SeveralTeachersConfig():
            teachers = {name: without_cache(one) for name, one in teacher.teachers.items()}
            return teacher.model_copy(update={"teachers": teachers})
        case _:
            return teacher


def decoding_seconds(config: RunConfig, student: LanguageModel, task: Task) -> list[float]:
    """Measure how long the student takes to write a batch of the run's own number of rows: until
    its first tokens, and for each further token."""
    rollout = config.rollout
    prompts_at_once = max(1, rollout.max_batch_rows // rollout.group_size)
    num_prompts = min(rollout.prompts_per_batch, prompts_at_once)
    # Decoding is timed twice: with one token, which pays for the prompt, and with some more, whose
    # difference is the price of each further token.
    seconds = []
    for num_tokens in (1, 1 + _NUM_TIMED_TOKENS):
        short = rollout.model_copy(update={"max_completion_tokens": num_tokens})
        started = time.monotonic()
        graded_groups(
            student,
            task,
            "train",
            range(num_prompts),
            rollout=short,
            seed=stream_seed(config.seed, "trial"),
            problem_seed=config.seed,
        )
        seconds.append(time.monotonic() - started)
    num_batches = rollout.prompts_per_batch / num_prompts
    first, more = (num_batches * each for each in seconds)
    return [first, max(more - first, 0.0) / _NUM_TIMED_TOKENS]


def _step_times(
    config: RunConfig, batch: Sequence[StepResult], decoding: Sequence[float]
) -> tuple[StepTime, ...]:
    """Scale the time of a batch's steps to the run's numbers of completions and tokens.

    The student writes as long as decoding takes; all else takes time in proportion to the tokens.
    """
    groups = [group for result in batch for group in result.groups]
    completions = [rollout.completion for group in groups for rollout in group.rollouts]
    prompt = sum(len(group.prompt_token_ids) for group in groups) / len(groups)
    mean = sum(len(completion.token_ids) for completion in completions) / len(completions)
    loop = config.optimization
    rollout = config.rollout
    num_completions = rollout.prompts_per_batch * rollout.group_size / loop.steps_per_rollout_batch

    # What each part of the trial's steps took.
    seconds: dict[str, float] = {}
    for result in batch:
        for key, value in result.metrics.items():
            if key.startswith("time/") and value > 0:
                part = key.split("/")[1]
                seconds[part] = seconds.get(part, 0.0) + value

    # Where completions were cut, nobody knows their length: the longest allowed is the other end.
    lengths = [mean]
    if any(completion.is_truncated for completion in completions):
        lengths.append(float(rollout.max_completion_tokens))
    times = []
    for length in lengths:
        scale = num_completions / len(completions) * (prompt + length) / (prompt + mean)
        scaled = {part: scale * value for part, value in seconds.items()}
        if config.objective.written_by == "student":
            first, each = decoding
            scaled["generation"] = (first + each * (length - 1)) / loop.steps_per_rollout_batch
        times.append(StepTime(length, scaled))
    return tuple(times)


# --- what it says of the run ----------------------------------------------------------------------


def describe_trial(trial: Trial, config: RunConfig) -> list[Finding]:
    """Return the trial's findings, one line each."""
    message = (
        f"{trial.num_completions} completions of training prompts, cut at {trial.max_tokens} "
        f"tokens ({trial.num_truncated} were), {trial.mean_tokens:.0f} tokens on average, every "
        "second one counted as correct; at most "
        f"{trial.metrics['memory/peak/bytes'] / _GIB:.2f} GiB were held"
    )
    return [
        Finding("ok", "trial", message),
        *_log_ratio(trial.metrics, config),
        *_gates(trial.metrics, config),
        *_guards(trial.metrics, config),
        *_time(trial.steps),
    ]


def _log_ratio(metrics: Metrics, config: RunConfig) -> list[Finding]:
    if "teacher/log_ratio/mean" not in metrics:
        return []
    low, median, high = (metrics[f"teacher/log_ratio/{name}"] for name in ("q05", "q50", "q95"))
    subject = "log πS - log πT"
    message = (
        f"mean {metrics['teacher/log_ratio/mean']:+.2f} nats, median {median:+.2f}, nine tenths "
        f"between {low:+.2f} and {high:+.2f}"
    )
    if max(-low, high) >= SMALL_LOG_RATIO:
        return [Finding("ok", subject, message)]
    if all(teacher.type == "ema" for _, teacher in single_teachers(config.teacher)):
        return [
            Finding("ok", subject, f"{message}: the moving average begins as the student itself")
        ]
    what = "the teacher says what the student says, so it changes nothing; is it the same model?"
    return [Finding("warning", subject, f"{message}: {what}")]


def _gates(metrics: Metrics, config: RunConfig) -> list[Finding]:
    positive = metrics.get("objective/gated_positive/frac")
    negative = metrics.get("objective/gated_negative/frac")
    if not config.objective.gates_by_teacher or positive is None or negative is None:
        return []
    message = (
        f"at the first step {positive:.0%} of the tokens where the advantage is positive, "
        f"{negative:.0%} where it is negative"
    )
    if "objective/clamped/frac" in metrics:
        message += f"; {metrics['objective/clamped/frac']:.0%} are clamped"
    return [Finding("ok", "gated", message)]


def _guards(metrics: Metrics, config: RunConfig) -> list[Finding]:
    """Return what the run's guards would say if all of its steps were like the first."""
    watch = Watch(config)
    said = []
    for step in range(1, _NUM_LIKE_THE_TRIAL + 1):
        said += watch.see({**metrics, "step": step})
    # Rewards are alternated and completions cut by the trial itself.
    by_the_trial = ("reward/", "rollout/")
    metric_of = {name: guard.condition.metric for name, guard in watch.guards.items()}
    return [
        Finding("warning", warning.name.replace("_", " "), warning.message)
        for warning in said
        if not metric_of[warning.name].startswith(by_the_trial)
    ]


def _time(steps: tuple[StepTime, ...]) -> list[Finding]:
    first = steps[0]
    parts = ", ".join(
        f"{part.replace('_', ' ')} {_duration(s)}" for part, s in first.seconds.items() if s >= 0.05
    )
    message = (
        f"about {_duration(first.total)} a step with completions of {first.completion_tokens:.0f} "
        f"tokens ({parts})"
    )
    if len(steps) > 1:
        message += f"; {_duration(steps[1].total)} if all had {steps[1].completion_tokens:.0f}"
    return [Finding("ok", "time", message)]


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"
