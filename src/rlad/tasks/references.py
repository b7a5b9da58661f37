"""Check that a task's verifier accepts its reference answers: each is graded as a completion."""

import time
from collections import Counter
from dataclasses import dataclass, replace

from rlad.errors import UserError
from rlad.tasks.answers import ANSWER_FORMATS
from rlad.tasks.base import Judgement, Problem, Task, Verdict
from rlad.tasks.episodes import episode_rules
from rlad.tasks.jsonl import JsonlTask
from rlad.tasks.several import SeveralTasks

_NUM_PROBLEMS = 200
_NUM_FIRST = 5
_MAX_SECONDS = 20.0
_WRAPPERS = ("Answer: {}", "<answer>{}</answer>", "\\boxed{{{}}}")
_ONLY_MARKED = "correct only if all of it is marked as the answer, as within <answer> tags"


@dataclass(frozen=True, slots=True)
class ReferenceGrades:
    """The number of a task's reference answers that are graded correct for their own problems."""

    name: str
    num_problems: int
    num_correct: int
    message: str
    """what is wrong with the others, and what to do; empty if nothing is"""
    num_planned: int = 0
    """number of answers to grade without the time limit"""


def require_working_verifier(task: Task) -> list[ReferenceGrades]:
    """Grade the reference answers of the first training problems of a task, or of each of several
    tasks, against themselves.

    Raises `UserError` if none of them is correct.
    """
    if episode_rules(task) is not None:
        return []  # an episode has no reference answer
    if isinstance(task, SeveralTasks):
        return [grades for one in task.tasks.values() for grades in require_working_verifier(one)]
    available = task.num_problems("train")
    num = _NUM_PROBLEMS if available is None else max(1, min(_NUM_PROBLEMS, available))
    started = None
    problems: list[Problem] = []
    judgements: list[Judgement] = []
    for index in range(num):
        problems.append(task.problem("train", index))
        judgements.append(_grade(task, problems[-1]))
        # The first judgement starts the verifier's process, which may take long under load.
        started = started or time.monotonic()
        is_hopeless = len(judgements) == _NUM_FIRST and not any(map(_judged, judgements))
        if is_hopeless or time.monotonic() - started > _MAX_SECONDS:
            break
    if not any(map(_judged, judgements)):
        raise UserError(
            f"the verifier of task {task.name!r} cannot judge the reference answers of the first "
            f"{len(judgements)} training problems ({judgements[0].reason}); fix the verifier or "
            f"the answers{_remedy(task, problems)}."
        )
    grades = _grades(task, problems, judgements)
    if grades.num_correct == 0:
        raise UserError(f"{grades.message}.")
    return [replace(grades, num_planned=num)]


def _judged(judgement: Judgement) -> bool:
    return judgement.verdict is not Verdict.CANNOT_JUDGE


def _grade(task: Task, problem: Problem) -> Judgement:
    """Grade a reference answer as a whole completion, or with a usual mark around it. The reason
    says if it is correct only with a mark."""
    first = task.judge(problem, problem.answer)
    if first.verdict is Verdict.CORRECT:
        return first
    for wrapper in _WRAPPERS:
        judgement = task.judge(problem, wrapper.format(problem.answer))
        if judgement.verdict is Verdict.CORRECT:
            # Generated tasks and a user's own verifiers may require a mark.
            is_strange = isinstance(task, JsonlTask) and task.has_built_in_verifier
            return replace(judgement, reason=_ONLY_MARKED) if is_strange else judgement
    return first


def _grades(task: Task, problems: list[Problem], judgements: list[Judgement]) -> ReferenceGrades:
    num = len(judgements)
    kinds = Counter(map(_kind, judgements))
    if kinds[""] == num:
        return ReferenceGrades(task.name, num, num, "")
    at = next(i for i, judgement in enumerate(judgements) if _kind(judgement))
    reason = judgements[at].reason
    reason = f" ({reason})" if reason not in ("", _ONLY_MARKED) else ""
    doubtful = " and ".join(f"{count} are {kind}" for kind, count in kinds.items() if kind)
    message = (
        f"{task.name}: of {num} reference answers, graded for their own problems, {doubtful}, for "
        f"example {problems[at].answer[:80]!r}{reason}; write the answers as a model would, or "
        f"choose another verifier{_remedy(task, problems)}"
    )
    num_correct = num - kinds["wrong"] - kinds["not judged"]
    return ReferenceGrades(task.name, num, num_correct, message)


def _kind(judgement: Judgement) -> str:
    if judgement.verdict is Verdict.CORRECT:
        return judgement.reason
    return "wrong" if judgement.verdict is Verdict.WRONG else "not judged"


def _remedy(task: Task, problems: list[Problem]) -> str:
    """Name the `answer_format` with which most of the answers would be correct."""
    if not isinstance(task, JsonlTask) or not task.has_built_in_verifier:
        return ""
    best, most = "", 0
    for name, extract in ANSWER_FORMATS.items():
        found = [extract(problem.answer) for problem in problems]
        num = sum(
            bool(one) and task.grade(one, one).verdict is Verdict.CORRECT for one in found if one
        )
        if num > most:
            best, most = name, num
    return (
        f', or set task.answer_format = "{best}", with which {most} of {len(problems)} are correct'
        if best != "whole" and most > len(problems) / 2
        else ""
    )
