"""A teacher that works elsewhere is asked about each group when it is finished, while the student
writes the others.

The questions and the answers are those that would be asked and given afterwards; only the time of
asking differs.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from torch import Tensor

from rlad.rollouts.grading import timed
from rlad.rollouts.types import Metrics
from rlad.teachers.base import Ask, Spans, Teacher, TeacherRequest


class AskedAhead:
    """What was asked about the rollouts of a batch, by their numbers, and what waits for the
    answers."""

    def __init__(self, ask: Ask, spans: Spans, seconds: Metrics):
        self._ask, self._spans, self.seconds = ask, spans, seconds
        self._requests: dict[int, TeacherRequest] = {}
        self._waits: list[tuple[Sequence[int], Callable[[], list[Tensor]]]] = []

    def ask(self, rows: Sequence[int], requests: Sequence[TeacherRequest]) -> None:
        """Begin to have some rollouts scored."""
        self._requests |= zip(rows, requests, strict=True)
        self._waits.append((rows, self._ask(requests)))

    def answers(self, rows: Sequence[int]) -> tuple[list[TeacherRequest], list[Tensor]]:
        """What was asked about the rollouts, which must be all that were asked about, and the
        log-probs; waits for them.

        Notes for how many seconds the teacher had worked before.
        """
        assert sorted(self._requests) == list(rows), (
            "a group is asked about as it would be within its batch"
        )
        began = time.monotonic()
        scores = {
            row: values
            for asked, wait in self._waits
            for row, values in zip(asked, wait(), strict=True)
        }
        self.seconds["teacher/overlap/seconds"] = covered_seconds(self._spans, until=began)
        return [self._requests[row] for row in rows], [scores[row] for row in rows]


@contextmanager
def asking_ahead(teacher: Teacher | None, seconds: Metrics) -> Iterator[AskedAhead | None]:
    """None without a teacher, and for one that would take the student's device from it.

    What is still under way when the block is left is given up. The time that asking takes is added
    to `seconds`.
    """
    if teacher is None or not teacher.works_elsewhere:
        yield None
        return
    spans: Spans = []
    with ExitStack() as held:
        with timed(seconds, "time/teacher/seconds"):
            ask = held.enter_context(teacher.asking(spans))
        spans.clear()  # of what a teacher asks before all else the end was waited for
        yield AskedAhead(ask, spans, seconds)


def covered_seconds(spans: Spans, *, until: float) -> float:
    """For how long before `until` at least one of the spans was open."""
    total, covered_to = 0.0, float("-inf")
    for start, end in sorted((start, min(end, until)) for start, end in spans):
        total += max(end - max(start, covered_to), 0.0)
        covered_to = max(covered_to, end)
    return total
