"""What is wrong with a run, read from its directory: the guards' table over all its steps, and what
only hindsight sees.

Reads and never writes; loads no model.
"""

import json
import math
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from rlad.config.file import load_config
from rlad.config.run import RunConfig
from rlad.errors import UserError
from rlad.runs.checkpoints import damage
from rlad.runs.directory import CHECKPOINTS, ENVIRONMENT, EVAL, METRICS, SAMPLES, RunDirectory
from rlad.runs.guards import Watch

LEVELS = ("error", "warning", "note")

# Half of the time is generation in a usual run, so a part has to take much more to be the one thing
# worth speeding up.
LARGE_TIME_SHARE = 0.8
FEW_STEPS_FOR_TIME = 10
# One validation beyond the first tells noise from learning no better than a coin does.
FEW_VALIDATIONS = 3

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """error: figures or files are wrong; warning: training does not do what it should; note: worth
    knowing."""

    level: Literal["error", "warning", "note"]
    name: str
    message: str
    step: int | None = None
    value: float | None = None
    limit: float | None = None


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a run directory holds."""

    run: RunDirectory
    config: RunConfig
    steps: Sequence[Row]
    evaluations: Sequence[Row]
    samples: Sequence[Row]
    is_training: bool
    free_bytes: int

    @property
    def last_step(self) -> int:
        return max((row["step"] for row in self.steps), default=0)

    @property
    def resume(self) -> str:
        return f"`rlad train {self.run.path} --resume`"


@dataclass(frozen=True, slots=True)
class Diagnoses:
    """All that was found, the worst first."""

    run: Path
    state: str
    found: Sequence[Diagnosis]

    @property
    def is_healthy(self) -> bool:
        return all(each.level == "note" for each in self.found)

    def to_json(self) -> dict[str, Any]:
        found = [
            {k: str(v) if v in (math.inf, -math.inf) else v for k, v in asdict(each).items()}
            for each in self.found
        ]
        return {
            "run": str(self.run),
            "state": self.state,
            "healthy": self.is_healthy,
            "found": found,
        }


def diagnose(path: Path, *, free_bytes: int | None = None) -> Diagnoses:
    """Look at the run in `path`. `UserError` when there is none. `free_bytes` takes the place of
    what its disk has."""
    run = RunDirectory(path)
    if not run.exists():
        raise UserError(
            f"there is no run in {path}; give the directory of a run, which holds config.toml and run.json."
        )
    rows, found = {}, []
    for name in (METRICS, EVAL, SAMPLES):
        rows[name], problem = _rows(run, name)
        found += [problem] if problem else []
    free = shutil.disk_usage(path).free if free_bytes is None else free_bytes
    evidence = Evidence(
        run, load_config(path), rows[METRICS], rows[EVAL], rows[SAMPLES], run.is_locked(), free
    )
    for look in LOOKS:
        found += look(evidence)
    return Diagnoses(
        path, _state(evidence), sorted(found, key=lambda each: LEVELS.index(each.level))
    )


def _rows(run: RunDirectory, name: str) -> tuple[list[Row], Diagnosis | None]:
    """The rows of a file up to the first that is none."""
    rows: list[Row] = []
    try:
        for row in run.read(name):
            if isinstance(row["step"], int):
                rows.append(row)
    except (ValueError, OSError) as error:
        return rows, Diagnosis("error", "unreadable_file", str(error))
    return rows, None


def _state(evidence: Evidence) -> str:
    done = f"step {evidence.last_step} of {evidence.config.optimization.num_steps}"
    return f"{done}, " + (
        "finished"
        if evidence.run.is_finished()
        else "training"
        if evidence.is_training
        else "stopped"
    )


# --- files ----------------------------------------------------------------------------------------


def _steps(evidence: Evidence) -> Iterator[Diagnosis]:
    numbers = [row["step"] for row in evidence.steps]
    present = sorted({0, *numbers})
    gaps = [(low + 1, high - low - 1) for low, high in pairwise(present) if high - low > 1]
    num_missing = sum(length for _, length in gaps)
    repair = f"put back a copy of {METRICS}, or start the run again with --overwrite; figures and time limits count its rows"
    if gaps:
        first = gaps[0][0]
        which = (
            f"step {first}" if num_missing == 1 else f"{num_missing} steps, the first is {first}"
        )
        yield Diagnosis("error", "steps_missing", f"{METRICS} lacks {which}: {repair}.", first)
    keys = {
        METRICS: numbers,
        SAMPLES: [row["step"] for row in evidence.samples],
        EVAL: [(row["step"], row.get("split")) for row in evidence.evaluations],
    }
    for name, values in keys.items():
        if doubled := [key for key, count in Counter(values).items() if count > 1]:
            step = doubled[0][0] if isinstance(doubled[0], tuple) else doubled[0]
            message = f"{name} has more than one row of step {step}: two processes may have written it; {repair}."
            yield Diagnosis("error", "steps_doubled", message, step)


def _checkpoints(evidence: Evidence) -> Iterator[Diagnosis]:
    run = evidence.run
    damaged = [(path, reason) for _, path in run.checkpoints() if (reason := damage(path))]
    whole = [
        path.name for _, path in run.checkpoints() if path not in [broken for broken, _ in damaged]
    ]
    for path, reason in damaged:
        then = (
            f"{evidence.resume} takes {whole[-1]}"
            if whole
            else "no whole one is left: start again with --overwrite"
        )
        message = f"checkpoint {path.name} is damaged ({reason}): put back a copy of it, or leave it: {then}."
        yield Diagnosis("error", "damaged_checkpoint", message)
    for path in sorted((run.path / CHECKPOINTS).glob("damaged-*")):
        yield Diagnosis(
            "note",
            "set_aside_checkpoint",
            f"{path.name} was found damaged by a resumed run; it may be deleted.",
        )


def _versions(evidence: Evidence) -> Iterator[Diagnosis]:
    try:
        described = json.loads((evidence.run.path / ENVIRONMENT).read_text(encoding="utf-8"))
        sessions = [described, *described.get("resumed", [])]
        pairs = [(before, after, after.get("step", 0)) for before, after in pairwise(sessions)]
        changes = [(_changed(before, after), step) for before, after, step in pairs]
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        yield Diagnosis(
            "error",
            "unreadable_file",
            f"{ENVIRONMENT} is not what a run has written; put back a copy of it.",
        )
        return
    for changed, step in changes:
        message = f"resumed behind step {step} with {changed}: it is not bit for bit the run that it would have been."
        yield Diagnosis("note", "resumed_with_other_versions", message, step)


def _changed(before: Row, after: Row) -> str:
    old, new = ({**each["versions"], "commit": each.get("commit")} for each in (before, after))
    return ", ".join(
        f"{name} {new[name]} instead of {old.get(name)}"
        for name in new
        if new[name] != old.get(name)
    )


def _progress(evidence: Evidence) -> Iterator[Diagnosis]:
    if evidence.run.is_finished():
        return
    if evidence.is_training:
        yield Diagnosis(
            "note", "training", "a process is training here now; this is what it has done so far."
        )
        return
    checkpoints = evidence.run.checkpoints()
    start = (
        f"from {checkpoints[-1][1].name}"
        if checkpoints
        else "from the start, as it has no checkpoint yet"
    )
    message = f"the run stopped before its end ({_state(evidence)}); go on {start}: {evidence.resume[1:-1]}"
    yield Diagnosis("warning", "unfinished", message, evidence.last_step)


def _disk(evidence: Evidence) -> Iterator[Diagnosis]:
    checkpoints = evidence.run.checkpoints()
    if not checkpoints or evidence.run.is_finished():
        return
    size = sum(path.stat().st_size for path in checkpoints[-1][1].rglob("*") if path.is_file())
    if evidence.free_bytes < 2 * size:
        message = (
            f"the disk has {evidence.free_bytes / 2**20:.0f} MiB left and a checkpoint takes "
            f"{size / 2**20:.0f}, of which the "
            "next is written before an old one is deleted: free some space."
        )
        yield Diagnosis(
            "warning", "disk_nearly_full", message, value=evidence.free_bytes, limit=2 * size
        )


# --- training -------------------------------------------------------------------------------------


def _guards(evidence: Evidence) -> Iterator[Diagnosis]:
    watch = Watch(evidence.config)
    warnings = [warning for row in evidence.steps for warning in watch.see(row)]
    for each in warnings:
        after = "" if watch.still_speaks(each.name) else " It was over by the last step."
        message = f"from step {each.step} on: {each.message}{after}"
        yield Diagnosis("warning", each.name, message, each.step, each.value, each.limit)


def _learning(evidence: Evidence) -> Iterator[Diagnosis]:
    """The run's validations against their intervals: learned nothing, fell back, or got worse."""
    rows = sorted(filter(_is_validation, evidence.evaluations), key=lambda row: row["step"])
    if len(rows) < FEW_VALIDATIONS:
        return
    first, last = rows[0], rows[-1]
    best = max(rows, key=lambda row: row["pass@1"]["mean"])
    low, high = first["pass@1"]["low"], first["pass@1"]["high"]
    now, top = last["pass@1"], best["pass@1"]
    if best is not first and now["high"] < top["low"]:
        message = (
            f"validation pass@1 was {top['mean']:.1%} at step {best['step']} and is "
            f"{now['mean']:.1%} now, beyond both "
            "intervals: the student has unlearned what it could. Use that checkpoint, or train "
            "again with a lower "
            "optimization.learning_rate, fewer steps, or optimization.kl_coef."
        )
        yield Diagnosis("warning", "best_long_ago", message, best["step"], now["high"], top["low"])
    elif now["high"] < low:
        message = (
            f"validation pass@1 fell from {first['pass@1']['mean']:.1%} to {now['mean']:.1%}: "
            "training makes the student "
            "worse. Lower optimization.learning_rate; check the verifier on samples.jsonl and the "
            "teacher with `rlad check`."
        )
        yield Diagnosis("warning", "worse_than_before", message, last["step"], now["high"], low)
    elif all(low <= row["pass@1"]["mean"] <= high for row in rows):
        message = (
            f"validation pass@1 never left the interval that it had before training, {low:.1%} to "
            f"{high:.1%}: nothing was "
            "learned that can be seen. Train longer or with a higher optimization.learning_rate, "
            "take problems that the "
            "student solves sometimes, or measure on more (evaluation.num_validation_problems)."
        )
        yield Diagnosis("warning", "no_learning", message, last["step"])


def _is_validation(row: Row) -> bool:
    estimate = row.get("pass@1")
    numbers = (
        [estimate.get(name) for name in ("mean", "low", "high")]
        if isinstance(estimate, dict)
        else [None]
    )
    return row.get("split") == "validation" and all(
        isinstance(number, int | float) for number in numbers
    )


def _time(evidence: Evidence) -> Iterator[Diagnosis]:
    spent: dict[str, float] = {}
    for row in evidence.steps:
        for key, value in row.items():
            if key.startswith("time/") and isinstance(value, int | float):
                part = key.split("/")[1]
                spent[part] = spent.get(part, 0.0) + value
    total = sum(spent.values())
    if len(evidence.steps) < FEW_STEPS_FOR_TIME or not total > 0:
        return
    part = max(spent, key=spent.__getitem__)
    if (share := spent[part] / total) > LARGE_TIME_SHARE:
        message = f"{share:.0%} of the training time is {part}: {_FASTER.get(part, 'look there first to make it faster')}."
        yield Diagnosis("note", "time_in_one_part", message, value=share, limit=LARGE_TIME_SHARE)


_FASTER = {
    "generation": "a GPU, a larger rollout.max_batch_rows or a smaller rollout.max_completion_tokens makes it faster",
    "teacher": "a teacher of type 'served' on a GPU, a smaller or a quantised one makes it faster",
    "update": "a GPU, student.dtype = bfloat16, or no student.gradient_checkpointing makes it faster",
    "rewards": "the verifier is slow; look at what it does with long completions",
}

LOOKS = (_steps, _checkpoints, _versions, _progress, _disk, _guards, _learning, _time)
