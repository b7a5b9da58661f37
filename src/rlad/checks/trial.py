"""A trial of a run: a handful of completions, what the teacher says of them, and how long a step
takes. Writes nothing.

Everything happens to copies in memory: the student's one step is forgotten, a cached teacher is
asked past its cache.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlad.checks.top_choices import TopChoices, compare_top_choices
from rlad.config.run import RunConfig
from rlad.config.teacher import CachedTeacherConfig, PrivilegedTeacherConfig, SeveralTeachersConfig
from rlad.engines.knobs import objective_knobs
from rlad.engines.metrics import TokenStats
from rlad.engines.native.loop import NativeEngine
from rlad.engines.rollout_batch import RolloutBatch
from rlad.models.loading import LanguageModel
from rlad.models.student import load_student
from rlad.objectives import OBJECTIVES
from rlad.rollouts.prompts import prompt_token_ids
from rlad.rollouts.sampling import sample
from rlad.rollouts.types import Rollout, RolloutGroup
from rlad.scoring.scorer import Scorer
from rlad.seeds import stream_seed
from rlad.tasks import Problem, Task, make_task
from rlad.teachers import prepare_teacher
from rlad.teachers.asking import count_missing
from rlad.teachers.base import Teacher, TeacherRequest
from rlad.teachers.local import LocalTeacher
from rlad.teachers.several import task_names

NUM_PROMPTS, GROUP_SIZE, MAX_TOKENS, SECONDS = 4, 4, 64, 30.0
# Tokens that each row is decoded for in order to time the run's own batch size.
_NUM_TIMED_TOKENS = 9


@dataclass(frozen=True, slots=True)
class TeacherTrial:
    """What the teacher says of the trial's tokens; shares are between 0 and 1, log-ratios log πS -
    log πT in nats."""

    missing: float
    """share of tokens without a finite log-prob; those are left out of the rest"""
    mean: float | None
    mean_size: float | None
    """of the log-ratio's absolute value"""
    median_size: float | None
    gated_positive: float | None
    """TRRD: share of tokens without gradient at the first step if all advantages were positive;
    None for other objectives"""
    gated_negative: float | None
    """the same if all were negative"""
    clamped: float | None
    top_choices: TopChoices | None
    """None where the teacher's distributions are out of reach"""


@dataclass(frozen=True, slots=True)
class StepSeconds:
    """Of one optimiser step, evaluation left out, if all completions have so many tokens."""

    completion_tokens: float
    generation: float
    teacher: float
    update: float
    """with the passes of old policy and reference where there are any"""

    @property
    def total(self) -> float:
        return self.generation + self.teacher + self.update


@dataclass(frozen=True, slots=True)
class Trial:
    num_completions: int
    max_tokens: int
    num_truncated: int
    mean_tokens: float
    teacher: TeacherTrial | None
    steps: tuple[StepSeconds, ...]
    """completions as long as the trial's, and as long as allowed; empty where TRL makes them and
    where no teacher answers"""

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {
            "steps": [asdict(step) | {"total": step.total} for step in self.steps]
        }


def run_trial(config: RunConfig) -> Trial:
    """Loads the models. Raises `UserError` for whatever the run itself would stop at before or in
    its first step."""
    small = _small(config)
    student = load_student(small)
    with closing(make_task(**config.task.model_dump())) as task:
        teacher = prepare_teacher(small, student)
        try:
            decoding = _Decoding(config, student, task)
            tokens = max(
                4,
                min(
                    MAX_TOKENS,
                    config.rollout.max_completion_tokens,
                    int(SECONDS / decoding.seconds_per_token),
                ),
            )
            batch = _sampled(small, student, task, tokens)
            asked, teacher_seconds = (
                (None, 0.0) if teacher is None else _ask(small, student, teacher, batch)
            )
            steps, is_answered = (
                (),
                asked is None or asked.missing <= config.optimization.max_missing_teacher_share,
            )
            if is_answered:
                update_seconds = _update_seconds(small, student, task, teacher, batch)
                steps = _steps(config, batch, decoding, teacher_seconds, update_seconds)
        finally:
            if teacher:
                teacher.close()
    lengths = [len(completion) for completion in batch.completions]
    truncated = sum(rollout.completion.is_truncated for rollout in batch.rollouts)
    return Trial(len(lengths), tokens, truncated, sum(lengths) / len(lengths), asked, steps)


def _small(config: RunConfig) -> RunConfig:
    """The run with a handful of completions, one step on them, no KL leash, and no cache around its
    teacher.

    Several tasks take turns: at least one prompt of each, so that the teacher of each is asked.
    """
    rollout, loop = config.rollout, config.optimization
    num_prompts = max(min(NUM_PROMPTS, rollout.prompts_per_batch), len(task_names(config)))
    size = {"prompts_per_batch": num_prompts, "group_size": min(GROUP_SIZE, rollout.group_size)}
    return config.model_copy(
        update={
            "rollout": rollout.model_copy(update=size),
            "optimization": loop.model_copy(update={"steps_per_rollout_batch": 1, "kl_coef": 0.0}),
            "teacher": without_cache(config.teacher),
        }
    )


def without_cache(teacher: Any) -> Any:
    """A `[teacher]` section with no cache in it."""
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


# --- generation -------------------------------------------------------------------------------------------------------


class _Decoding:
    """Seconds that the run's own batch of rows takes: for its prompts, and for each token of all
    rows."""

    def __init__(self, config: RunConfig, student: LanguageModel, task: Task):
        rollout = config.rollout
        num_rows = rollout.prompts_per_batch * rollout.group_size
        num_prompts = max(
            1, min(rollout.prompts_per_batch, rollout.max_batch_rows // rollout.group_size)
        )
        self.num_batches = num_rows / (num_prompts * rollout.group_size)
        prompts = [ids for _, ids in _prompts(config, student, task, num_prompts)]

        def seconds(num_tokens: int) -> float:
            return _timed(lambda: _sample(config, student, prompts, num_tokens))[1]

        seconds(1)  # the first call also loads kernels
        one = self.seconds_of_prompts = seconds(1)
        more = min(
            2 if one > SECONDS / _NUM_TIMED_TOKENS else _NUM_TIMED_TOKENS,
            rollout.max_completion_tokens,
        )
        self.seconds_per_token = max((seconds(more) - one) / (more - 1), 1e-6) if more > 1 else one


def _prompts(
    config: RunConfig, student: LanguageModel, task: Task, number: int
) -> list[tuple[Problem, list[int]]]:
    problems = [task.problem("train", i, seed=config.seed) for i in range(number)]
    return [(p, prompt_token_ids(student.tokenizer, p.asked, config.rollout)) for p in problems]


def _sample(
    config: RunConfig, student: LanguageModel, prompts: Sequence[Sequence[int]], num_tokens: int
) -> list[Any]:
    rollout, seed = config.rollout, stream_seed(config.seed, "trial")
    return sample(
        student,
        prompts,
        group_size=rollout.group_size,
        max_completion_tokens=num_tokens,
        temperature=rollout.temperature,
        seed=seed,
        max_batch_rows=rollout.max_batch_rows,
    )


def _sampled(
    config: RunConfig, student: LanguageModel, task: Task, num_tokens: int
) -> RolloutBatch:
    """Completions of the first training prompts, not judged: half of them get the advantage 1, the
    others -1."""
    prompts = _prompts(config, student, task, config.rollout.prompts_per_batch)
    completions = _sample(config, student, [ids for _, ids in prompts], num_tokens)
    groups = [
        RolloutGroup(
            i,
            problem,
            tuple(ids),
            tuple(Rollout(completion, "", "wrong", 0.0) for completion in group),
        )
        for i, ((problem, ids), group) in enumerate(zip(prompts, completions, strict=True))
    ]
    num_rollouts = sum(map(len, completions))
    return RolloutBatch(0, groups, 1 - 2 * (torch.arange(num_rollouts, dtype=torch.float64) % 2))


# --- the teacher ------------------------------------------------------------------------------------------------------


def _ask(
    config: RunConfig, student: LanguageModel, teacher: Teacher, batch: RolloutBatch
) -> tuple[TeacherTrial, float]:
    """Its log-probs, which the batch keeps, compared with the student's; and the seconds that they
    took."""
    requests = _with_peers(
        batch.teacher_requests(), student, batch
    )
    teacher.logprobs(requests[:1])  # the first call also loads kernels
    theirs, seconds = _timed(lambda: teacher.logprobs(requests))
    batch.teacher_logprobs = theirs
    loop, temperature = config.optimization, config.rollout.temperature
    ours = Scorer(student, temperature=temperature, tokens_per_batch=loop.tokens_per_batch).score(
        batch.prompts, batch.completions
    )
    num_missing, num_tokens = count_missing(theirs)
    log_ratio = torch.cat(ours) - torch.cat(theirs).to(torch.cat(ours))
    log_ratio = log_ratio[log_ratio.isfinite()].double()
    known = len(log_ratio) > 0
    return TeacherTrial(
        missing=num_missing / max(num_tokens, 1),
        mean=float(log_ratio.mean()) if known else None,
        mean_size=float(log_ratio.abs().mean()) if known else None,
        median_size=float(log_ratio.abs().median()) if known else None,
        **_gates(config, ours, theirs),
        top_choices=_top_choices(student, teacher, batch),
    ), seconds


def _with_peers(
    requests: Sequence[TeacherRequest], student: LanguageModel, batch: RolloutBatch
) -> list[TeacherRequest]:
    """Each with another completion of its group in place of the correct one that a teacher may be
    shown; none is judged."""
    size = len(batch.groups[0].rollouts)
    texts = student.tokenizer.batch_decode(
        [list(ids) for ids in batch.completions], skip_special_tokens=True
    )

    def peer(i: int) -> str | None:
        start = i // size * size
        return next((texts[j] for j in range(start, start + size) if j != i and texts[j]), None)

    return [replace(request, peer_solution=peer(i)) for i, request in enumerate(requests)]


def _gates(
    config: RunConfig, ours: Sequence[Tensor], theirs: Sequence[Tensor]
) -> dict[str, float | None]:
    """Shares of the tokens that TRRD itself gates and clamps at the first step, where πS = πold."""
    names = ("gated_positive", "gated_negative", "clamped")
    if not config.objective.gates_by_teacher:
        return dict.fromkeys(names)
    student, teacher = (
        pad_sequence(list(ours), batch_first=True),
        pad_sequence(list(theirs), batch_first=True),
    )
    mask = pad_sequence([torch.ones(len(row), dtype=torch.bool) for row in ours], batch_first=True)
    shares: dict[str, float | None] = dict.fromkeys(names)
    for name, advantage in zip(names, (1.0, -1.0, 1.0), strict=True):
        _, stats = OBJECTIVES["trrd"].function(
            student_logprobs=student,
            old_logprobs=student,
            teacher_logprobs=teacher,
            advantages=torch.full((len(student),), advantage),
            mask=mask,
            **objective_knobs(config.objective, step=0),
        )
        kept = mask & ~stats["dropped"]
        shares[name] = float(stats[name][kept].float().mean()) if kept.any() else None
    return shares


def _top_choices(
    student: LanguageModel, teacher: Teacher, batch: RolloutBatch
) -> TopChoices | None:
    if (
        not isinstance(teacher, LocalTeacher)
        or teacher.language_model.model.device != student.model.device
    ):
        return None
    return compare_top_choices(student, teacher.language_model, batch.prompts, batch.completions)


# --- time -------------------------------------------------------------------------------------------------------------


def _update_seconds(
    config: RunConfig,
    student: LanguageModel,
    task: Task,
    teacher: Teacher | None,
    batch: RolloutBatch,
) -> float:
    engine = NativeEngine(config, student=student, task=task, teacher=teacher)
    engine.accumulate_gradient(batch, [0], TokenStats())  # the first call also loads kernels
    return _timed(lambda: engine.update(batch, range(len(batch.groups))))[1]


def _steps(
    config: RunConfig,
    batch: RolloutBatch,
    decoding: _Decoding,
    teacher_seconds: float,
    update_seconds: float,
) -> tuple[StepSeconds, ...]:
    """The trial's times for the run's numbers of completions and tokens: decoding by the token of
    the whole batch, scoring and update in proportion to prompt and completion tokens. No completion
    is left out, so a real step may take less.
    """
    rollout, loop, objective = (
        config.rollout,
        config.optimization,
        OBJECTIVES.get(config.objective.type),
    )
    prompt = sum(map(len, batch.prompts)) / len(batch.prompts)
    mean = sum(map(len, batch.completions)) / len(batch.completions)
    # A pass without gradient is about a third of one with it.
    passes = bool(loop.kl_coef) + bool(
        loop.steps_per_rollout_batch > 1 or (objective and objective.token_advantages)
    )
    truncated = any(rollout.completion.is_truncated for rollout in batch.rollouts)
    lengths = [mean, float(rollout.max_completion_tokens)] if truncated else [mean]

    def at(length: float) -> StepSeconds:
        num_completions = (
            rollout.prompts_per_batch * rollout.group_size / loop.steps_per_rollout_batch
        )
        scale = num_completions / len(batch.rollouts) * (prompt + length) / (prompt + mean)
        generation = decoding.num_batches * (
            decoding.seconds_of_prompts + decoding.seconds_per_token * (length - 1)
        )
        update = update_seconds * scale * (1 + passes / 3)
        return StepSeconds(
            length, generation / loop.steps_per_rollout_batch, teacher_seconds * scale, update
        )

    return tuple(at(length) for length in dict.fromkeys(lengths))


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - started
