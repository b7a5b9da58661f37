"""Find what is wrong with a run from its directory: the guards over all its steps, and problems
that are visible only afterwards.

It only reads, and loads no model.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from rlad.config.file import load_config
from rlad.config.run import RunConfig
from rlad.errors import UserError
from rlad.runs.checkpoints import damage
from rlad.runs.directory import CHECKPOINTS, ENVIRONMENT, EVAL, METRICS, SAMPLES, RunDirectory
from rlad.runs.guards import Watch, json_number
from rlad.runs.rows import History, Row, first_damage, read_history, read_rows

LEVELS = ("error", "warning", "note")


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """A finding about a run. error: figures or files are wrong; warning: training does not do what
    it should; note: worth knowing."""

    level: Literal["error", "warning", "note"]
    name: str
    message: str
    step: int | None = None
    value: float | None = None
    limit: float | None = None


@dataclass(frozen=True, slots=True)
class Evidence:
    """The content of a run directory, which all checks read."""

    run: RunDirectory
    config: RunConfig
    history: History
    is_training: bool

    @property
    def last_step(self) -> int:
        return int(max((row["step"] for row in self.history.steps), default=0))

    @property
    def state(self) -> str:
        done = f"step {self.last_step} of {self.config.optimization.num_steps}"
        if self.run.is_finished():
            return f"{done}, finished"
        return f"{done}, {'training' if self.is_training else 'stopped'}"

    @property
    def resume(self) -> str:
        return f"rlad train {self.run.path} --resume"


@dataclass(frozen=True, slots=True)
class Diagnoses:
    """All findings, the worst first."""

    run: Path
    state: str
    found: Sequence[Diagnosis]

    @property
    def is_healthy(self) -> bool:
        return all(each.level == "note" for each in self.found)

    def to_json(self) -> dict[str, Any]:
        return {
            "run": str(self.run),
            "state": self.state,
            "healthy": self.is_healthy,
            "found": [asdict(each) | {"value": json_number(each.value)} for each in self.found],
        }


def diagnose(path: Path) -> Diagnoses:
    """Examine the run in `path`. Raises `UserError` if there is none."""
    run = RunDirectory(path)
    if not run.exists():
        raise UserError(
            f"there is no run in {path}; give the directory of a run, with config.toml and "
            "run.json."
        )
    # Damaged rows are reported; the checks use the others.
    history = read_history(run)
    damaged = [*history.damage, *first_damage(read_rows(run, SAMPLES, Row))]
    evidence = Evidence(run, load_config(path), history, run.is_locked())
    found = [
        Diagnosis("error", "unreadable_file", f"{sentence}; restore a copy of that file.")
        for sentence in damaged
    ]
    found += wrong_steps(history)
    for look in LOOKS:
        found += look(evidence)
    return Diagnoses(path, evidence.state, sorted(found, key=lambda each: LEVELS.index(each.level)))


# --- files ----------------------------------------------------------------------------------------


def wrong_steps(history: History) -> Iterator[Diagnosis]:
    """Find steps that are missing from a file or occur in it more than once."""
    numbers = [int(row["step"]) for row in history.steps]
    repair = (
        f"restore a copy of {METRICS}, or start the run again with --overwrite; figures and time "
        "limits depend on its rows"
    )
    # Count gaps between neighbours, since a damaged number may be arbitrarily large.
    gaps = [(low + 1, high - low - 1) for low, high in pairwise(sorted({0, *numbers}))]
    num_missing = sum(length for _, length in gaps)
    if num_missing:
        first = next(start for start, length in gaps if length)
        which = f"{num_missing} steps, first step {first}" if num_missing > 1 else f"step {first}"
        yield Diagnosis("error", "steps_missing", f"{METRICS} lacks {which}: {repair}.", first)
    # There is one row per step, and for evaluations one row per step and split.
    evaluations = Counter((row.step, row.split) for row in history.evaluations)
    counts = [(METRICS, step, count) for step, count in Counter(numbers).items()]
    counts += [(EVAL, step, count) for (step, _), count in evaluations.items()]
    doubled = next(((name, step) for name, step, count in counts if count > 1), None)
    if doubled:
        message = (
            f"{doubled[0]} has more than one row for step {doubled[1]}: two processes may have "
            f"written to it; {repair}."
        )
        yield Diagnosis("error", "steps_doubled", message, doubled[1])


def _checkpoints(evidence: Evidence) -> Iterator[Diagnosis]:
    run = evidence.run
    reasons = {path: damage(path) for _, path in run.checkpoints()}
    whole = [path.name for path, reason in reasons.items() if reason is None]
    then = "no intact checkpoint is left, so start again with --overwrite"
    if whole:
        then = f"`{evidence.resume}` then uses {whole[-1]}"
    for path, reason in reasons.items():
        if reason is not None:
            message = (
                f"checkpoint {path.name} is damaged ({reason}): restore a copy of it, or ignore "
                f"it: {then}."
            )
            yield Diagnosis("error", "damaged_checkpoint", message)
    for path in sorted((run.path / CHECKPOINTS).glob("damaged-*")):
        message = (
            f"{path.name} is a damaged checkpoint that a resumed run renamed; it may be deleted."
        )
        yield Diagnosis("note", "set_aside_checkpoint", message)


class _Session(BaseModel):
    """The content of `run.json`: the start of the run, and each time that it was resumed."""

    step: int = 0
    versions: dict[str, str]
    commit: str | None = None
    resumed: list["_Session"] = []


def _versions(evidence: Evidence) -> Iterator[Diagnosis]:
    try:
        first = _Session.model_validate_json((evidence.run.path / ENVIRONMENT).read_bytes())
    except (OSError, ValidationError):
        message = f"{ENVIRONMENT} is not a file that a run has written; restore a copy of it."
        yield Diagnosis("error", "unreadable_file", message)
        return
    for before, after in pairwise([first, *first.resumed]):
        old = before.versions | {"commit": before.commit}
        new = after.versions | {"commit": after.commit}
        changes = [
            f"{name} {new[name]} instead of {old.get(name)}"
            for name in new
            if new[name] != old.get(name)
        ]
        message = (
            f"resumed after step {after.step} with {', '.join(changes)}: it is not bit for bit "
            "equal to an uninterrupted run."
        )
        yield Diagnosis("note", "resumed_with_other_versions", message, after.step)


def _progress(evidence: Evidence) -> Iterator[Diagnosis]:
    if evidence.run.is_finished():
        return
    if evidence.is_training:
        message = "a process is still training this run; the findings are those so far."
        yield Diagnosis("note", "training", message)
        return
    checkpoints = evidence.run.checkpoints()
    start = "from the start, as it has no checkpoint yet"
    if checkpoints:
        start = f"from {checkpoints[-1][1].name}"
    message = (
        f"the run stopped before its end ({evidence.state}); continue {start}: {evidence.resume}"
    )
    yield Diagnosis("warning", "unfinished", message, evidence.last_step)


# --- training -------------------------------------------------------------------------------------


def _guards(evidence: Evidence) -> Iterator[Diagnosis]:
    watch = Watch(evidence.config)
    warnings = [warning for row in evidence.history.steps for warning in watch.see(row)]
    for each in warnings:
        after = "" if watch.still_speaks(each.name) else " By the last step this had ended."
        message = f"from step {each.step} on: {each.message}{after}"
        yield Diagnosis("warning", each.name, message, each.step, each.value, each.limit)


def _learning(evidence: Evidence) -> Iterator[Diagnosis]:
    """Compare the run's validations with their intervals: whether it learned nothing, lost what it
    had learned, or got worse."""
    # With only one validation after the first, noise and learning cannot be distinguished.
    rows = evidence.history.validations
    if len(rows) < 3:
        return
    first = rows[0].pass_at_1
    now = rows[-1].pass_at_1
    best_row = max(rows, key=lambda row: row.pass_at_1.mean)
    best = best_row.pass_at_1
    last_step = rows[-1].step
    if best is not first and now.high < best.low:
        message = (
            f"validation pass@1 was {best.mean:.1%} at step {best_row.step} and is "
            f"{now.mean:.1%} now, and the intervals do not overlap: the student has got worse. Use "
            "that checkpoint, or train again with a lower optimization.learning_rate, fewer "
            "steps, or optimization.kl_coef."
        )
        yield Diagnosis("warning", "best_long_ago", message, best_row.step, now.high, best.low)
    elif now.high < first.low:
        message = (
            f"validation pass@1 fell from {first.mean:.1%} to {now.mean:.1%}: training makes the "
            "student worse. Lower optimization.learning_rate; check the verifier on samples.jsonl "
            "and the teacher with `rlad check`."
        )
        yield Diagnosis("warning", "worse_than_before", message, last_step, now.high, first.low)
    elif all(first.low <= row.pass_at_1.mean <= first.high for row in rows):
        message = (
            f"validation pass@1 never left its interval from before training, {first.low:.1%} to "
            f"{first.high:.1%}: no learning can be detected. Train longer or with a higher "
            "optimization.learning_rate, use problems that the student solves sometimes, or "
            "measure on more (evaluation.num_validation_problems)."
        )
        yield Diagnosis("warning", "no_learning", message, last_step)


LOOKS = (_checkpoints, _versions, _progress, _guards, _learning)
