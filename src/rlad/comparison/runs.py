"""Reading run directories for a report: what a run reached, and why one is missing."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from rlad.config.file import changed_settings, load_config
from rlad.config.run import NonNegativeInt, RunConfig
from rlad.errors import UserError
from rlad.runs.directory import EVAL, METRICS, RunDirectory
from rlad.runs.results import ProblemResult, summarise
from rlad.runs.statistics import Estimate

PARTS = ("generation", "teacher", "update", "rest")
"""of the time that training takes; rest: rewards, reference, log-probs of the old policy"""

_LARGEST = 1e18
"""below it figures can be added up and drawn"""


@dataclass(frozen=True, slots=True)
class ReportedRun:
    """A run directory and the name of the method in the report."""

    method: str
    path: Path


@dataclass(frozen=True, slots=True)
class MissingRun:
    """A run that is not in the tables, and why, in a sentence."""

    method: str
    seed: int | None
    reason: str


@dataclass(frozen=True)
class Run:
    """A finished run: config, held-out results before and after training, and its steps."""

    method: str
    path: Path
    config: RunConfig
    before: Sequence[ProblemResult]
    after: Sequence[ProblemResult]
    ood_before: Sequence[ProblemResult]
    """out of distribution; empty where the run has no such test"""
    ood_after: Sequence[ProblemResult]
    validation: Sequence[tuple[int, float]]
    """(step, pass@1)"""
    num_validation_problems: int
    steps: Sequence[Mapping[str, Any]]
    """rows of metrics.jsonl; those of step 1, 2, 3, ..."""

    @property
    def seed(self) -> int:
        return self.config.seed

    @property
    def num_steps(self) -> int:
        return len(self.steps)

    @cached_property
    def seconds(self) -> dict[str, float]:
        """Seconds of training by part; evaluation and loading are not in it."""
        spent: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        for row in self.steps:
            for key, value in row.items():
                if key.startswith("time/"):
                    part = key.split("/")[1]
                    spent[part if part in PARTS else "rest"] += value
        return spent

    @property
    def completion_lengths(self) -> dict[int, float]:
        """Mean length of the student's rollouts by step; none for `sft`, which trains on what the
        teacher wrote."""
        key, samples = (
            "rollout/completion_tokens/mean",
            self.config.objective.written_by == "student",
        )
        return {row["step"]: row[key] for row in self.steps if samples and key in row}

    @property
    def completion_tokens(self) -> float:
        """Tokens of all rollouts of the run; NaN when it has not counted them."""
        per_step = (
            self.config.rollout.prompts_per_batch
            // self.config.optimization.steps_per_rollout_batch
        )
        lengths = self.completion_lengths
        is_known = len(lengths) == len(self.steps)
        return (
            sum(lengths.values()) * per_step * self.config.rollout.group_size
            if is_known
            else math.nan
        )

    @property
    def teacher_tokens(self) -> float:
        return sum(row.get("teacher/tokens/count", 0.0) for row in self.steps)

    @property
    def peak_memory(self) -> float:
        """Bytes; NaN when it was not recorded."""
        return max(
            (row["memory/peak/bytes"] for row in self.steps if "memory/peak/bytes" in row),
            default=math.nan,
        )

    def to_json(self) -> dict[str, Any]:
        """The row of `results.jsonl`; what is not known is null."""
        row = {
            "method": self.method,
            "seed": self.seed,
            "run": str(Path(*self.path.resolve().parts[-2:])),
            "settings": changed_settings(self.config),
            "test_before": _split_json(self.before),
            "test_after": _split_json(self.after),
            "ood_before": _split_json(self.ood_before),
            "ood_after": _split_json(self.ood_after),
            "validation": [{"step": step, "pass@1": value} for step, value in self.validation],
            "num_steps": self.num_steps,
            "seconds": self.seconds,
            "completion_tokens": self.completion_tokens,
            "teacher_tokens": self.teacher_tokens,
            "peak_memory_bytes": self.peak_memory,
        }
        row["settings"].pop("run_dir", None)
        return {
            key: None if isinstance(value, float) and math.isnan(value) else value
            for key, value in row.items()
        }


class _Step(BaseModel):
    """A row of metrics.jsonl. A figure may be infinite, such as the largest ratio."""

    model_config = ConfigDict(strict=True, extra="allow")
    __pydantic_extra__: dict[str, float]

    step: int


class _Mean(BaseModel):
    mean: FiniteFloat


class _Evaluation(BaseModel):
    """A row of eval.jsonl."""

    step: NonNegativeInt
    split: str
    pass_at_1: _Mean = Field(alias="pass@1")
    results: list[ProblemResult] = Field(min_length=1)


Row = TypeVar("Row", bound=BaseModel)


def read_run(reported: ReportedRun) -> Run | MissingRun:
    """The run in a directory; a run that is unfinished or cannot be read is a `MissingRun`."""
    seed = None
    try:
        directory = RunDirectory(reported.path)
        if not directory.exists():
            return MissingRun(reported.method, None, f"{reported.path} holds no run.")
        config = load_config(reported.path)
        seed = config.seed
        steps = _steps(directory)
        if not directory.is_finished():
            done = f"{len(steps)} of {config.optimization.num_steps} steps"
            return MissingRun(
                reported.method, seed, f"the run is not finished: {done}, no test after training."
            )
        return _finished_run(reported, config, steps, _read(directory, EVAL, _Evaluation))
    except (OSError, ValueError) as error:  # files that others may have cut or edited
        return MissingRun(reported.method, seed, f"{reported.path} cannot be read: {error}")


def _finished_run(
    reported: ReportedRun,
    config: RunConfig,
    steps: Sequence[Mapping[str, Any]],
    evaluations: Sequence[_Evaluation],
) -> Run:
    tests, ood = (_first_and_last(evaluations, split, config) for split in ("test", "ood"))
    if tests is None:
        raise UserError(f"{EVAL} lacks the test before or after training.")
    if late := [row.step for row in evaluations if row.step > config.optimization.num_steps]:
        raise UserError(
            f"{EVAL} has an evaluation of step {late[0]}, but the run has "
            f"{config.optimization.num_steps}."
        )
    validated = [row for row in evaluations if row.split == "validation"]
    return Run(
        method=reported.method,
        path=reported.path,
        config=config,
        before=tests[0],
        after=tests[1],
        ood_before=ood[0] if ood else (),
        ood_after=ood[1] if ood else (),
        validation=[(row.step, row.pass_at_1.mean) for row in validated],
        num_validation_problems=len(validated[-1].results) if validated else 0,
        steps=steps,
    )


def _read(directory: RunDirectory, name: str, kind: type[Row]) -> list[Row]:
    """The rows of a file; `UserError` that names the first one that is not of this kind, or no row
    at all."""
    rows: list[Row] = []
    try:
        for row in directory.read(name):
            rows.append(kind.model_validate(row))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = f", {'.'.join(map(str, first['loc']))}" if first["loc"] else ""
        raise UserError(f"row {len(rows) + 1} of {name}{where}: {first['msg']}.") from None
    return rows


def _steps(directory: RunDirectory) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl; a figure that is not finite, or too large to be added up, counts
    as not recorded."""
    steps = [row.model_dump() for row in _read(directory, METRICS, _Step)]
    for number, row in enumerate(steps, start=1):
        if row["step"] != number:
            raise UserError(
                f"row {number} of {METRICS} is of step {row['step']}; there must be one for each "
                "step."
            )
    return [{key: value for key, value in row.items() if abs(value) < _LARGEST} for row in steps]


def _first_and_last(
    evaluations: Sequence[_Evaluation], split: str, config: RunConfig
) -> tuple[Sequence[ProblemResult], Sequence[ProblemResult]] | None:
    """Results before and after training; None when there are not both. `UserError` when they do
    not fit together."""
    rows = sorted((row for row in evaluations if row.split == split), key=lambda row: row.step)
    if len(rows) < 2:
        return None
    before, after = rows[0].results, rows[-1].results
    if [(r.index, r.key) for r in before] != [(r.index, r.key) for r in after]:
        raise UserError(
            f"the {split} problems in {EVAL} are not the same before and after training."
        )
    for result in (*before, *after):
        _require_sound(
            result, f"{split} problem {result.index} in {EVAL}", config.evaluation.num_test_samples
        )
    return before, after


def _require_sound(result: ProblemResult, name: str, num_samples: int) -> None:
    if result.num_samples != num_samples:
        raise UserError(f"{name} has {result.num_samples} samples instead of {num_samples}.")
    counts = (result.num_correct, result.num_cannot_judge, result.num_truncated)
    tokens = result.mean_completion_tokens
    if min(counts) < 0 or max(counts) > num_samples or not 0 <= tokens < _LARGEST:
        raise UserError(f"{name} has counts that {num_samples} samples cannot have.")


def _split_json(results: Sequence[ProblemResult]) -> dict[str, Any] | None:
    """Figures of one test, intervals over problems, and how many samples of each problem were
    correct."""
    return (
        _plain(summarise(results)) | {"num_correct": [r.num_correct for r in results]}
        if results
        else None
    )


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return (
        {"mean": value.mean, "low": value.low, "high": value.high}
        if isinstance(value, Estimate)
        else value
    )
