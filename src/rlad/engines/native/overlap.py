"""Ask a teacher on another device about each group as soon as it is finished, while the student
samples the others.

Requests and answers are the same as if the teacher were asked afterwards; only the time differs.
"""

import time
from collections.abc import Iterable, Sequence

from rlad.teachers.base import Answer, Teacher, TeacherRequest


class AskedAhead:
    """The requests to a teacher about the groups of one rollout batch."""

    def __init__(self, teacher: Teacher):
        self._teacher = teacher
        self.answers: dict[int, list[Answer]] = {}
        """By the index of the group."""
        self.overlap_seconds = 0.0
        """How long the teacher had worked before its answers were waited for."""

    def submit(self, group_number: int, requests: Sequence[TeacherRequest]) -> None:
        """Start scoring the completions of one group."""
        self.answers[group_number] = self._teacher.submit(requests)

    def wait(self) -> list[Answer]:
        """Wait for all answers; return them in the order of the groups."""
        began = time.monotonic()
        answers = [answer for _, group in sorted(self.answers.items()) for answer in group]
        for answer in answers:
            answer.result()
        spans = [span for answer in answers for span in answer.spans]
        self.overlap_seconds = covered_seconds(spans, until=began)
        return answers


def covered_seconds(spans: Iterable[tuple[float, float]], *, until: float) -> float:
    """Return for how long before `until` at least one of the spans was open."""
    # Requests overlap, so go through their spans by start: each adds the part after the latest end
    # so far.
    total = 0.0
    covered_to = float("-inf")
    for start, end in sorted((start, min(end, until)) for start, end in spans):
        total += max(end - max(start, covered_to), 0.0)
        covered_to = max(covered_to, end)
    return total
