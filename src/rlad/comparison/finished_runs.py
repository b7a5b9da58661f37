"""Read finished runs from their directories for a report, and explain missing ones."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from pydantic_core import to_jsonable_python

from rlad.config.file import changed_settings, load_config
from rlad.config.run import RunConfig
from rlad.errors import UserError
from rlad.runs.directory import EVAL, RunDirectory
from rlad.runs.doctor import wrong_steps
from rlad.runs.rows import History, ProblemResult, read_history, summarise

PARTS = ("generation", "teacher", "update", "rest")
"""The parts of the training time; rest: rewards, reference, log-probs of the old policy."""

_LARGEST = 1e18
"""Figures below this can be summed and drawn."""

Results = Sequence[ProblemResult]


@dataclass(frozen=True, slots=True)
class ReportedRun:
    """A run directory and the name of the method in the report."""

    method: str
    path: Path


@dataclass(frozen=True, slots=True)
class MissingRun:
    """A run that is not in the tables, with the reason as a sentence."""

    method: str
    seed: int | None
    reason: str


@dataclass(frozen=True)
class Run:
    """A finished run: config, held-out results before and after training, and its steps."""

    method: str
    path: Path
    config: RunConfig
    history: History
    before: Results
    after: Results
    ood_before: Results
    """out-of-distribution results; empty if the run has no such test"""
    ood_after: Results

    @property
    def seed(self) -> int:
        return self.config.seed

    @cached_property
    def steps(self) -> Sequence[Mapping[str, float]]:
        """The rows of metrics.jsonl, for steps 1, 2, 3, ... A figure that is not finite, or too
        large to be summed, counts as not recorded."""
        return [
            {key: value for key, value in row.items() if abs(value) < _LARGEST}
            for row in self.history.steps
        ]

    @property
    def num_steps(self) -> int:
        return len(self.steps)

    def by_step(self, key: str) -> dict[int, float]:
        """Return a metric by step, where it was recorded."""
        return {int(row["step"]): row[key] for row in self.steps if key in row}

    @property
    def validation(self) -> dict[int, float]:
        """pass@1 by step"""
        return {row.step: row.pass_at_1.mean for row in self.history.validations}

    @cached_property
    def seconds(self) -> dict[str, float]:
        """Seconds of training by part, without evaluation and loading."""
        # A step records `time/PART/seconds` for the parts that its engine has.
        spent: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        for row in self.history.steps:
            for key, value in row.items():
                if key.startswith("time/"):
                    part = key.split("/")[1]
                    spent[part if part in PARTS else "rest"] += value
        return spent

    @property
    def completion_lengths(self) -> dict[int, float]:
        """Mean length of the student's rollouts by step; empty if the teacher wrote them."""
        if self.config.objective.written_by != "student":
            return {}
        return self.by_step("rollout/completion_tokens/mean")

    @property
    def completion_tokens(self) -> float:
        """Tokens of all rollouts of the run; NaN if it has not counted them."""
        lengths = self.completion_lengths
        if len(lengths) != self.num_steps:
            return math.nan
        rollout = self.config.rollout
        num_steps = self.config.optimization.steps_per_rollout_batch
        # A rollout batch is used for several steps, so a row counts its share of the rollouts.
        per_step = rollout.prompts_per_batch // num_steps * rollout.group_size
        return sum(lengths.values()) * per_step

    @property
    def teacher_tokens(self) -> float:
        return float(sum(self.by_step("teacher/tokens/count").values()))

    @property
    def gated_positive(self) -> float:
        """Share of the tokens with positive advantage that the clip left without gradient, mean
        over the steps; NaN if it was not recorded."""
        return self._mean_over_steps("objective/gated_positive/frac")

    @property
    def gated_negative(self) -> float:
        """The same of the tokens with negative advantage."""
        return self._mean_over_steps("objective/gated_negative/frac")

    def _mean_over_steps(self, key: str) -> float:
        values = self.by_step(key).values()
        return fmean(values) if values else math.nan

    @property
    def peak_memory(self) -> float:
        """Peak memory in bytes; NaN if it was not recorded."""
        return max(self.by_step("memory/peak/bytes").values(), default=math.nan)

    def to_json(self) -> dict[str, Any]:
        """Return the row of `results.jsonl`; unknown values are null."""
        settings = changed_settings(self.config)
        settings.pop("run_dir", None)
        row = {
            "method": self.method,
            "seed": self.seed,
            "run": str(Path(*self.path.resolve().parts[-2:])),
            "settings": settings,
            "test_before": _summary(self.before),
            "test_after": _summary(self.after),
            "ood_before": _summary(self.ood_before),
            "ood_after": _summary(self.ood_after),
            "validation": [{"step": step, "pass@1": v} for step, v in self.validation.items()],
            "num_steps": self.num_steps,
            "seconds": self.seconds,
            "completion_tokens": self.completion_tokens,
            "teacher_tokens": self.teacher_tokens,
            "gated_positive": self.gated_positive,
            "gated_negative": self.gated_negative,
            "peak_memory_bytes": self.peak_memory,
        }
        unknown = [k for k, v in row.items() if isinstance(v, float) and math.isnan(v)]
        return row | dict.fromkeys(unknown)


def read_run(reported: ReportedRun) -> Run | MissingRun:
    """Read the run in a directory. An unfinished or unreadable run becomes a `MissingRun`."""
    method = reported.method
    path = reported.path
    directory = RunDirectory(path)
    if not directory.exists():
        return MissingRun(method, None, f"{path} holds no run.")
    seed = None
    try:
        config = load_config(path)
        seed = config.seed
        history = read_history(directory)
    except (OSError, UserError) as error:  # files that others may have cut or edited
        return MissingRun(method, seed, f"{path} cannot be read: {error}")
    if not directory.is_finished():
        done = f"{len(history.steps)} of {config.optimization.num_steps} steps"
        reason = f"the run is not finished: {done}, no test after training."
        return MissingRun(method, seed, reason)
    tests = {split: _first_and_last(history, split) for split in ("test", "ood")}
    if problem := next(_problems(history, tests, config), None):
        return MissingRun(method, seed, f"{path} cannot be read: {problem}")
    return Run(method, path, config, history, *tests["test"], *tests["ood"])


def _first_and_last(history: History, split: str) -> tuple[Results, Results]:
    """Return the results before and after training; empty unless both exist."""
    rows = [row for row in history.evaluations if row.split == split]
    rows.sort(key=lambda row: row.step)
    return (rows[0].results, rows[-1].results) if len(rows) > 1 else ((), ())


def _problems(
    history: History, tests: Mapping[str, tuple[Results, Results]], config: RunConfig
) -> Iterator[str]:
    """Yield what would silently distort the figures of a report."""
    yield from (f"{sentence}." for sentence in history.damage)
    # Figures by step and totals assume one row per step.
    yield from (each.message for each in wrong_steps(history))
    if not tests["test"][0]:
        yield f"{EVAL} lacks the test before or after training."
    last_step = config.optimization.num_steps
    latest = max((row.step for row in history.evaluations), default=0)
    if latest > last_step:
        yield f"{EVAL} has an evaluation of step {latest}, but the run has {last_step}."
    for split, (before, after) in tests.items():
        if [(r.index, r.key) for r in before] != [(r.index, r.key) for r in after]:
            yield f"the {split} problems in {EVAL} are not the same before and after training."
        num_samples = config.evaluation.num_test_samples
        if any(r.num_samples != num_samples for r in (*before, *after)):
            yield (
                f"the {split} problems in {EVAL} have not {num_samples} samples each, which "
                "evaluation.num_test_samples asks for."
            )


def _summary(results: Results) -> dict[str, Any] | None:
    """Summarise a test, with intervals over problems and the number of correct samples per
    problem."""
    if not results:
        return None
    figures = to_jsonable_python(summarise([results]))
    return figures | {"num_correct": [r.num_correct for r in results]}
