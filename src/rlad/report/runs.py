"""Reading run directories for a report: what a run reached, and why one is missing."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rlad.config import RunConfig
from rlad.config_file import changed_settings, load_config
from rlad.problem_results import ProblemResult, summarise
from rlad.run_dir import EVAL, METRICS, RunDirectory
from rlad.statistics import Estimate

Rows = list[dict[str, Any]]
PARTS = ("generation", "teacher", "update", "rest")
"""of the time that training takes; rest: rewards, reference, log-probs of the old policy"""


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
    steps: Rows

    @property
    def seed(self) -> int:
        return self.config.seed

    @property
    def num_steps(self) -> int:
        return self.steps[-1]["step"] if self.steps else 0

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
    def completion_tokens(self) -> float:
        """Tokens of all rollouts of the run; NaN when it has not counted them."""
        per_step = self.config.rollout.prompts_per_batch // self.config.optimization.steps_per_rollout_batch
        lengths = [row.get("rollout/completion_tokens/mean", math.nan) for row in self.steps]
        return sum(lengths) * per_step * self.config.rollout.group_size

    @property
    def teacher_tokens(self) -> float:
        return sum(row.get("teacher/tokens/count", 0.0) for row in self.steps)

    @property
    def peak_memory(self) -> float:
        """Bytes; NaN when it was not recorded."""
        return max((row["memory/peak/bytes"] for row in self.steps if "memory/peak/bytes" in row), default=math.nan)

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
        return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in row.items()}


def read_run(reported: ReportedRun) -> Run | MissingRun:
    """The run in a directory; a run that is unfinished or cannot be read is a `MissingRun`."""
    try:
        return _read(reported)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # files that others may have cut or edited
        return MissingRun(reported.method, None, f"{reported.path} cannot be read: {type(error).__name__}: {error}")


def _read(reported: ReportedRun) -> Run | MissingRun:
    directory = RunDirectory(reported.path)
    if not directory.exists():
        return MissingRun(reported.method, None, f"{reported.path} holds no run.")
    config = load_config(reported.path)
    steps, evaluations = list(directory.read(METRICS)), list(directory.read(EVAL))
    done = steps[-1]["step"] if steps else 0
    if not directory.is_finished():
        reason = f"the run is not finished: {done} of {config.optimization.num_steps} steps, no test after training."
        return MissingRun(reported.method, config.seed, reason)
    tests, ood = _results(evaluations, "test"), _results(evaluations, "ood")
    if len(tests) < 2 or not tests[0] or not tests[-1]:
        return MissingRun(reported.method, config.seed, f"{reported.path} lacks the test before or after training.")
    validated = [row for row in evaluations if row["split"] == "validation"]
    return Run(
        method=reported.method,
        path=reported.path,
        config=config,
        before=tests[0],
        after=tests[-1],
        ood_before=ood[0] if len(ood) > 1 else (),
        ood_after=ood[-1] if len(ood) > 1 else (),
        validation=[(row["step"], row["pass@1"]["mean"]) for row in validated],
        num_validation_problems=len(validated[-1]["results"]) if validated else 0,
        steps=steps,
    )


def _results(evaluations: Rows, split: str) -> list[list[ProblemResult]]:
    rows = sorted((row for row in evaluations if row["split"] == split), key=lambda row: row["step"])
    return [[ProblemResult(**result) for result in row["results"]] for row in rows]


def _split_json(results: Sequence[ProblemResult]) -> dict[str, Any] | None:
    """Figures of one test, intervals over problems, and how many samples of each problem were correct."""
    return _plain(summarise(results)) | {"num_correct": [r.num_correct for r in results]} if results else None


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return {"mean": value.mean, "low": value.low, "high": value.high} if isinstance(value, Estimate) else value
