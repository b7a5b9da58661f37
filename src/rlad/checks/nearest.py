"""Find the measured cases whose student and teacher solve about as much as a run's, and show what
helped there. Cases are shown instead of a rule: on unseen cases no rule was better than a trivial
one (docs/when-a-teacher-helps.md)."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import dist
from pathlib import Path
from typing import Any

from rlad.findings import Finding
from rlad.runs.statistics import Estimate

NUM_SHOWN = 3
SMALL_LEAD = 0.05
"""A smaller lead of a teacher over its student counts as none."""
_TABLE = Path(__file__).with_name("measured_cases.json")
"""Made by benchmarks/teacher_map.py."""


@dataclass(frozen=True, slots=True)
class MeasuredCase:
    """The results for one student, teacher and task; figures are shares."""

    name: str
    student: float
    teacher: float
    to_grpo: Mapping[str, Estimate]
    """pass@1 minus GRPO's, by method"""
    num_seeds: int
    """number of seeds of the method with the fewest"""

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> "MeasuredCase":
        methods = row["methods"]
        return cls(
            name=row["case"],
            student=row["student"],
            teacher=row["teacher"],
            to_grpo={name: Estimate(*one["minus grpo"]) for name, one in methods.items()},
            num_seeds=min(one["seeds"] for one in methods.values()),
        )

    @property
    def message(self) -> str:
        ordered = sorted(self.to_grpo.items(), key=lambda item: -item[1].mean)
        differences = ", ".join(f"{name} {_points(found)}" for name, found in ordered)
        return (
            f"{self.name} (student {self.student:.0%}, teacher {self.teacher:.0%}, "
            f"{self.num_seeds} seeds), points above grpo: {differences}"
        )


def measured_cases() -> list[MeasuredCase]:
    """Read the cases that come with the package."""
    return [MeasuredCase.of(row) for row in json.loads(_TABLE.read_text(encoding="utf-8"))]


def nearest(
    student: float, teacher: float, cases: Sequence[MeasuredCase], number: int = NUM_SHOWN
) -> list[MeasuredCase]:
    """Choose the cases nearest in pass@1 of student and teacher, nearest first."""
    return sorted(cases, key=lambda one: dist((student, teacher), (one.student, one.teacher)))[
        :number
    ]


def describe_nearest(student: Estimate, teacher: Estimate) -> list[Finding]:
    """Report what helped in the nearest cases, and how reliable that is."""
    findings = [
        Finding("ok", "nearest case", one.message)
        for one in nearest(student.mean, teacher.mean, measured_cases())
    ]
    if teacher.mean - student.mean <= SMALL_LEAD:
        message = (
            f"the teacher solves {teacher.mean:.0%} and the student {student.mean:.0%}: a student "
            "that imitates ends near its teacher; GRPO needs no teacher"
        )
        findings.append(Finding("warning", "lead", message))
    message = (
        "these are tiny models on a few tasks, and no rule of ours predicts the best method "
        "reliably; compare on yours: rlad compare"
    )
    return [*findings, Finding("ok", "how far it carries", message)]


def _points(found: Estimate) -> str:
    mean, low, high = (100 * one for one in (found.mean, found.low, found.high))
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"
