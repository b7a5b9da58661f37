"""A teacher that works elsewhere is asked about each group when it is finished, while the student
writes the others.

The questions and the answers are those that would be asked and given afterwards; only the time of
asking differs.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rlad.rollouts.types import Metrics
from rlad.teachers.base import Answer, Teacher, TeacherRequest


class AskedAhead:
    """What a teacher was asked about the rollouts of a batch, and its answers, by their numbers."""

    def __init__(self, teacher: Teacher, seconds: Metrics):
        self._teacher = teacher
        self.seconds = seconds
        self.requests: dict[int, TeacherRequest] = {}
        self._answers: dict[int, Answer] = {}

    def ask(self, rows: Sequence[int], requests: Sequence[TeacherRequest]) -> None:
        """Begin to have some rollouts scored."""
        self.requests |= zip(rows, requests, strict=True)
        self._answers |= zip(rows, self._teacher.submit(requests), strict=True)

    def answers(self, rows: Sequence[int]) -> list[Answer]:
        """Wait for the answers about the rollouts, which must be all that were asked about.

        Notes for how many seconds the teacher had worked before.
        """
        assert sorted(self.requests) == list(rows), (
            "a group is asked about as it would be within its batch"
        )
        began = time.monotonic()
        answers = [self._answers[row] for row in rows]
        for answer in answers:
            answer.result()
        spans = [span for answer in answers for span in answer.spans]
        self.seconds["teacher/overlap/seconds"] = covered_seconds(spans, until=began)
        return answers


@contextmanager
def asking_ahead(teacher: Teacher | None, seconds: Metrics) -> Iterator[AskedAhead | None]:
    """None without a teacher, and for one that would take the student's device from it.

    What is still under way when the block is left is given up. The time that asking takes is added
    to `seconds`.
    """
    if teacher is None:
        yield None
        return
    try:
        yield AskedAhead(teacher, seconds) if teacher.works_elsewhere else None
    finally:
        teacher.cancel()


def covered_seconds(spans: Sequence[tuple[float, float]], *, until: float) -> float:
    """For how long before `until` at least one of the spans was open."""
    total, covered_to = 0.0, float("-inf")
    for start, end in sorted((start, min(end, until)) for start, end in spans):
        total += max(end - max(start, covered_to), 0.0)
        covered_to = max(covered_to, end)
    return total
