"""A teacher that works elsewhere is asked about each group when it is finished, while the student
writes the others.

The requests and the answers are those that would be made and given afterwards; only the time of
asking differs.
"""

import time
from collections.abc import Iterable, Sequence

from rlad.teachers.base import Answer, Teacher, TeacherRequest


class AskedAhead:
    """What a teacher was asked about the groups of one rollout batch."""

    def __init__(self, teacher: Teacher):
        self._teacher = teacher
        self.answers: dict[int, list[Answer]] = {}
        """by the number of the group"""
        self.overlap_seconds = 0.0
        """for how long the teacher had worked when its answers were waited for"""

    def submit(self, group_number: int, requests: Sequence[TeacherRequest]) -> None:
        """Begin to have the completions of one group scored."""
        self.answers[group_number] = self._teacher.submit(requests)

    def wait(self) -> list[Answer]:
        """Wait for all answers; returns them in the order of the groups."""
        began = time.monotonic()
        answers = [answer for _, group in sorted(self.answers.items()) for answer in group]
        for answer in answers:
            answer.result()
        spans = [span for answer in answers for span in answer.spans]
        self.overlap_seconds = covered_seconds(spans, until=began)
        return answers


def covered_seconds(spans: Iterable[tuple[float, float]], *, until: float) -> float:
    """For how long before `until` at least one of the spans was open."""
    # Requests overlap, so their spans are walked by start: each adds what lies past the latest end
    # so far.
    total = 0.0
    covered_to = float("-inf")
    for start, end in sorted((start, min(end, until)) for start, end in spans):
        total += max(end - max(start, covered_to), 0.0)
        covered_to = max(covered_to, end)
    return total
