"""Check whether the teacher, with several contexts, ranks the student's completions as the verifier
does."""

import math
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

import torch

from rlad.checks.trial import without_cache
from rlad.config.context import ContextConfig
from rlad.config.run import RunConfig
from rlad.config.teacher import PrivilegedTeacherConfig
from rlad.engines.rollout_batch import RolloutBatch, teacher_request
from rlad.errors import UserError
from rlad.findings import Finding
from rlad.models.student import load_student
from rlad.rollouts.grading import graded_groups
from rlad.rollouts.types import RolloutGroup
from rlad.runs.statistics import Ranking, ranking
from rlad.seeds import stream_seed
from rlad.tasks import Verdict, make_task
from rlad.teachers import build_teacher, setting_of
from rlad.teachers.asking import of_actions
from rlad.teachers.base import Setting, Teacher, TeacherRequest
from rlad.teachers.privileged import PrivilegedTeacher, privileged

MIN_PROBLEMS = 5
"""Fewest problems with pairs; with fewer, an interval has no meaning."""
CONTEXTS: dict[str, dict[str, Any]] = {
    "no context": {},
    "reference answer": {"answer": True},
    "1S": {"num_successes": 1},
    "2S": {"num_successes": 2},
    "1F": {"num_failures": 1},
    "1S1F": {"num_successes": 1, "num_failures": 1},
    "2S1F": {"num_successes": 2, "num_failures": 1},
}
"""What the teacher is shown after the question: S correct and F wrong completions of the group."""


@dataclass(frozen=True, slots=True)
class RankedContext:
    """The teacher's ranking with one context."""

    context: str
    num_completions: int
    """number of completions for which everything that the context names was available"""
    ranking: Ranking

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def rank_contexts(config: RunConfig, num_problems: int) -> list[RankedContext]:
    """Sample completions of training problems from the initial student, and score them with each
    context.

    For a context, only completions count for which everything that it names is available.
    """
    if config.teacher is None:
        raise UserError("a ranking needs a [teacher] section; add one, or leave --ranking out.")
    student = load_student(config)
    with closing(make_task(**config.task.model_dump())) as task:
        groups = graded_groups(
            student,
            task,
            "train",
            range(num_problems),
            rollout=config.rollout,
            seed=stream_seed(config.seed, "ranking"),
            problem_seed=config.seed,
        )
    setting = setting_of(config, student)
    settings = without_cache(config.teacher)
    is_privileged = isinstance(settings, PrivilegedTeacherConfig)
    inner = settings.teacher if is_privileged else settings
    ranked = []
    with closing(build_teacher(inner, setting)) as teacher:
        if not any(isinstance(one, PrivilegedTeacherConfig) for one in inner.walk()):
            ranked += [
                rank_groups(name, shown_by, context, groups)
                for name, shown_by, context in _teachers(settings, teacher, setting)
            ]
        configured = privileged(teacher, settings, setting) if is_privileged else teacher
        ranked.append(rank_groups("as configured", configured, None, groups))
    return ranked


def _teachers(
    settings: Any, teacher: Teacher, setting: Setting
) -> Iterator[tuple[str, Teacher, ContextConfig | None]]:
    """Yield the teacher with each context, with the prompt format and thresholds of the config."""
    base = {"type": "privileged", "teacher": settings.model_dump(), "template": "{prompt}"}
    own = ContextConfig(answer=True)
    if isinstance(settings, PrivilegedTeacherConfig):
        base = settings.model_dump() | {"template": "{prompt}", "context": None}
        own = settings.context or own
    none = dict.fromkeys(("answer", "solution", "feedback"), False)
    none |= {"fields": (), "num_successes": 0, "num_failures": 0}
    for name, shown in CONTEXTS.items():
        context = own.model_copy(update=none | {"without_success": "silent"} | shown)
        one = PrivilegedTeacherConfig.model_validate(base)
        one = one.model_copy(update={"context": context if shown else None})
        yield name, privileged(teacher, one, setting), one.context


def rank_groups(
    name: str,
    teacher: Teacher,
    context: ContextConfig | None,
    groups: list[RolloutGroup],
) -> RankedContext:
    """Score graded groups with a teacher and one context."""
    batch = RolloutBatch(0, groups, torch.zeros(sum(len(group.rollouts) for group in groups)))
    rows = []
    requests = []
    for i in batch.judged.nonzero().flatten().tolist():
        request = teacher_request(groups[i // batch.group_size], i % batch.group_size)
        if teacher.speaks(request) and _is_whole(teacher, context, request):
            rows.append(i)
            requests.append(request)
    logprobs = teacher.logprobs(requests)
    scores: list[list[float]] = [[] for _ in groups]
    is_correct: list[list[bool]] = [[] for _ in groups]
    for i, request, values in zip(rows, requests, logprobs, strict=True):
        score = float(of_actions(values, request).mean())
        if math.isfinite(score):
            scores[i // batch.group_size].append(score)
            correct = batch.rollouts[i].verdict == Verdict.CORRECT
            is_correct[i // batch.group_size].append(correct)
    return RankedContext(name, sum(map(len, scores)), ranking(scores, is_correct))


def _is_whole(teacher: Teacher, context: ContextConfig | None, request: TeacherRequest) -> bool:
    """Return whether as many completions are shown as the context names, and everything else that
    exists."""
    if context is None:
        return True
    assert isinstance(teacher, PrivilegedTeacher)
    fitted = teacher.fitted(request)
    if fitted is None or fitted.num_dropped:
        return False
    return sum(block.is_peer for block in fitted.blocks) == context.num_peers


def describe_ranking(one: RankedContext) -> Finding:
    """Return the finding about one context."""
    found = one.ranking
    subject = f"ranking, {one.context}"
    if found.pairwise is None or found.auc is None:
        message = (
            f"none: among the {one.num_completions} completions that the teacher could score, no "
            "problem has both a correct and a wrong one"
        )
        return Finding("warning", subject, message)
    is_little = found.num_problems < MIN_PROBLEMS
    message = (
        f"a correct completion is above a wrong one of its problem in {found.pairwise} of "
        f"{found.num_pairs} pairs of {found.num_problems} problems; AUC over all "
        f"{one.num_completions} completions {found.auc}"
    )
    if is_little:
        message += ": too few problems to say much; give --ranking more"
    return Finding("warning" if is_little else "ok", subject, message)
