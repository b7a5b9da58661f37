"""The present state of a run from its files, whether it is training, finished or stopped."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from rlad.config.file import load_config
from rlad.config.run import RunConfig
from rlad.errors import UserError
from rlad.runs.directory import ROWS, SAMPLES, WARNINGS, RunDirectory
from rlad.runs.rows import History, SampleRow, read_history, read_rows

State = Literal["training", "finished", "stopped"]
_RECENT_STEPS = 20


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The present state of a run. Rows that cannot be read are left out."""

    run: RunDirectory
    config: RunConfig
    history: History
    samples: Sequence[SampleRow]
    """samples of the last step"""
    warnings: Sequence[str]
    """warnings of the guards, newest first"""
    state: State

    @property
    def step(self) -> int:
        return int(self.history.steps[-1]["step"]) if self.history.steps else 0

    @property
    def num_steps(self) -> int:
        return self.config.optimization.num_steps

    @property
    def metrics(self) -> Mapping[str, float]:
        """The metrics of the last step."""
        return self.history.steps[-1] if self.history.steps else {}

    @property
    def seconds_per_step(self) -> float | None:
        """The mean over the last steps; None before the first."""
        recent = self.history.steps[-_RECENT_STEPS:]
        spent = [sum(v for k, v in row.items() if k.startswith("time/")) for row in recent]
        return fmean(spent) if spent else None

    @property
    def seconds_left(self) -> float | None:
        """The time for the remaining steps at the speed of the last ones, without evaluations. None
        before the first step."""
        per_step = self.seconds_per_step
        return None if per_step is None else per_step * max(self.num_steps - self.step, 0)

    def values(self, key: str) -> dict[int, float]:
        """Return a metric by step, where it was recorded."""
        return {int(row["step"]): row[key] for row in self.history.steps if key in row}

    @property
    def validation(self) -> dict[int, float]:
        """Return validation pass@1 by step."""
        return {row.step: row.pass_at_1.mean for row in self.history.validations}


def take_snapshot(run: RunDirectory) -> Snapshot:
    """Read a run directory. Raises `UserError` if it is not one."""
    if not run.exists():
        raise UserError(
            f"there is no run in {run.path}; give the directory of a run, as `rlad train` names "
            "it, once the run has begun."
        )
    config = load_config(run.path)
    rows = [row for row in read_rows(run, SAMPLES, SampleRow) if not isinstance(row, str)]
    last = rows[-1].step if rows else 0
    warnings = [row for row in run.lines(WARNINGS) if isinstance(row, dict)]
    state: State = "training" if run.is_locked() else "stopped"
    if run.is_finished() and state == "stopped":
        state = "finished"
    return Snapshot(
        run,
        config,
        read_history(run),
        [row for row in rows if row.step == last],
        [f"step {row.get('step')}: {row.get('message')}" for row in reversed(warnings)],
        state,
    )


def version_of(run: RunDirectory) -> tuple[object, ...]:
    """Return a value that changes whenever the files of a snapshot change."""
    sizes = []
    for name in ROWS:
        path = run.path / name
        sizes.append(path.stat().st_size if path.is_file() else 0)
    return (*sizes, run.is_locked(), run.is_finished())


def duration(seconds: float) -> str:
    """Write a duration in seconds as a readable text."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
