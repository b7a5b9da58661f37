"""Compare several methods x several seeds under one budget: tune, train missing runs, report.

    DIRECTORY/runs/METHOD/seed-N/               a run directory; its console output in seed-N.log
    DIRECTORY/tuning/METHOD/lr-X/seed-N/        the runs that chose the learning rate
    DIRECTORY/report.html, report.md, results.jsonl

Each run is a separate process, so a run that fails or is killed does not affect the others. A
comparison that is started again continues with the missing runs.
"""

import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from rlad.comparison.finished_runs import MissingRun, ReportedRun
from rlad.comparison.report import COMPARISON, ComparisonFile, write_files, write_report
from rlad.config.comparison import CompareConfig, folder_name, method_config
from rlad.config.file import differing_settings, dump_config, load_config
from rlad.config.run import RunConfig
from rlad.errors import BUG_REPORT, UserError
from rlad.runs.directory import CHECKPOINTS, METRICS, RunDirectory
from rlad.runs.rows import read_history
from rlad.stopping import Stop

_POLL_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """A run of the comparison: its method, its config and its directory."""

    method: str
    config: RunConfig
    path: Path
    is_tuning: bool = False
    """whether it only chooses a learning rate"""

    @property
    def directory(self) -> RunDirectory:
        return RunDirectory(self.path)

    @property
    def log(self) -> Path:
        return self.path.with_name(f"{self.path.name}.log")

    def steps_done(self) -> int:
        metrics = self.path / METRICS
        return metrics.read_bytes().count(b"\n") if metrics.is_file() else 0

    def is_done(self) -> bool:
        """Return whether it has finished. Raises `UserError` if another run is in its place."""
        if not self.directory.exists():
            return False
        try:
            stored = load_config(self.path)
        except UserError:  # a damaged run, which its own process then reports
            return False
        differing = differing_settings(stored, self.config)
        if differing:
            raise UserError(
                f"{self.path} has a run with other settings than this comparison needs for "
                f"{self.method!r} ({'; '.join(differing)}); choose another directory for the "
                "comparison, or delete that run."
            )
        return self.directory.is_finished()

    def forget_checkpoints(self) -> None:
        """Delete the checkpoints of a finished run of the search, of which only the validations are
        used: those of many runs fill a disk."""
        if self.is_tuning and self.directory.is_finished():
            shutil.rmtree(self.path / CHECKPOINTS, ignore_errors=True)


Progress = Callable[[str, Sequence[PlannedRun]], None]
"""Called from time to time with a line to print (or ""), and the runs of the current stage."""


def compare(
    comparison: CompareConfig, folder: Path, *, progress: Progress = lambda line, runs: None
) -> Sequence[MissingRun]:
    """Run the missing parts of a comparison and write its report. Returns the runs that are missing
    from it. Relative paths of its config start from `folder`.

    Raises `UserError` if one of its run directories has another run or cannot be written, and
    `StopRequested` after Ctrl-C or SIGTERM, once the runs in progress have written their
    checkpoints.
    """
    root = Path(comparison.directory)
    rates, notes, missing = _tune(comparison, folder, progress)
    planned = final_runs(comparison, folder, rates)
    # A method whose search failed has no learning rate, and therefore no runs.
    if comparison.tuning is not None:
        planned = [run for run in planned if run.method in rates]
    missing += _train(planned, comparison.jobs, progress)
    finished = [ReportedRun(run.method, run.path) for run in planned if run.directory.is_finished()]
    methods = {method: folder_name(method) for method in comparison.methods}
    finished.sort(key=lambda run: list(methods).index(run.method))
    names = {name: method for method, name in methods.items()}
    described = ComparisonFile(methods=names, notes=notes, baseline=comparison.baseline)
    write_files(root, {COMPARISON: described.model_dump_json(indent=2)})
    return write_report(
        finished,
        root,
        missing=missing,
        title=f"Comparison {root.name}",
        notes=notes,
        baseline=comparison.baseline,
    )


def final_runs(
    comparison: CompareConfig, folder: Path, rates: Mapping[str, float]
) -> list[PlannedRun]:
    """Plan the reported runs, seed by seed, with the learning rates that were chosen for some
    methods."""
    return [
        _planned(comparison, folder, method, seed, rates.get(method))
        for seed in comparison.seeds
        for method in comparison.methods
    ]


def tuning_runs(
    comparison: CompareConfig, folder: Path
) -> dict[tuple[str, float], list[PlannedRun]]:
    """Plan the runs that choose the learning rates: (method, learning rate) -> one per tuning
    seed."""
    grid: dict[tuple[str, float], list[PlannedRun]] = {}
    tuning = comparison.tuning
    if tuning is None:
        return grid
    for rate in tuning.learning_rates:
        for method in comparison.methods:
            grid[method, rate] = [
                _planned(comparison, folder, method, seed, rate, is_tuning=True)
                for seed in tuning.seeds
            ]
    return grid


def _planned(
    comparison: CompareConfig,
    folder: Path,
    method: str,
    seed: int,
    rate: float | None,
    *,
    is_tuning: bool = False,
) -> PlannedRun:
    config = method_config(comparison, folder, method, seed=seed)
    place = Path("runs", folder_name(method))
    changes: dict[str, object] = {}
    if rate is not None:
        changes["optimization"] = config.optimization.model_copy(update={"learning_rate": rate})
    if is_tuning:
        place = Path("tuning", folder_name(method), f"lr-{rate:g}")
        # The test split is not used: a run must be tested on at least one problem, so take one.
        blind = {"num_test_problems": 1, "num_test_samples": 1, "ood_task": {}}
        changes["evaluation"] = config.evaluation.model_copy(update=blind)
    path = Path(comparison.directory, place, f"seed-{seed}")
    config = config.model_copy(update=changes | {"run_dir": str(path)})
    return PlannedRun(method, config, path, is_tuning)


def _tune(
    comparison: CompareConfig, folder: Path, progress: Progress
) -> tuple[dict[str, float], list[str], list[MissingRun]]:
    """Find the learning rate of each method, the report's notes on the search, and the failed
    runs."""
    tuning = comparison.tuning
    if tuning is None:
        return {}, [], []
    grid = tuning_runs(comparison, folder)
    failed = _train([run for runs in grid.values() for run in runs], comparison.jobs, progress)
    tried = ", ".join(f"{rate:g}" for rate in tuning.learning_rates)
    seeds = ", ".join(map(str, tuning.seeds))
    lines = [
        f"Learning rate of each method: the best of {tried} by pass@1 on the validation split "
        f"after the last step, mean over seeds {seeds}; the same search for all."
    ]
    rates: dict[str, float] = {}
    for method in comparison.methods:
        scores = {rate: _validation(grid[method, rate]) for rate in sorted(tuning.learning_rates)}
        # Ties go to the smallest rate; a rate with a failed run is never chosen.
        best = max(scores, key=lambda rate: scores[rate])
        if scores[best] >= 0:
            rates[method] = best
        shown = ", ".join(
            f"{rate:g}: {f'{score:.1%}' if score >= 0 else 'failed'}"
            for rate, score in scores.items()
        )
        line = f"{method}: {rates.get(method, math.nan):g} (validation {shown})"
        if method in rates and len(scores) > 1 and best in (min(scores), max(scores)):
            line += "; this is an end of the grid, so a wider one may have a better rate"
        lines.append(line)
    missing = [
        MissingRun(run.method, run.seed, f"while its learning rate was tuned: {run.reason}")
        for run in failed
    ]
    return rates, lines, missing


def _validation(runs: Sequence[PlannedRun]) -> float:
    """Return validation pass@1 after the last step, mean over seeds; -1 if a run is missing."""
    if not all(run.directory.is_finished() for run in runs):
        return -1.0
    return mean(read_history(run.directory).validations[-1].pass_at_1.mean for run in runs)


def _train(planned: Sequence[PlannedRun], jobs: int, progress: Progress) -> list[MissingRun]:
    """Train the runs that are not done, `jobs` in parallel; return the runs that failed."""
    waiting = [run for run in planned if not run.is_done()]
    for run in planned:  # those that ended after the last comparison was stopped
        run.forget_checkpoints()
    running: list[tuple[PlannedRun, subprocess.Popen[bytes]]] = []
    failed: list[MissingRun] = []
    num_done = len(planned) - len(waiting)
    progress(f"{num_done} of {len(planned)} runs are done already" if num_done else "", planned)
    # A signal only sets a flag, which is checked once per round. Whether a signal or an error ends
    # the loop, the runs in progress are told to write their checkpoints and are awaited, so that no
    # process keeps training unattended.
    stop = Stop()
    with stop.on_signals():
        try:
            while waiting or running:
                stop.check()
                while waiting and len(running) < jobs:
                    run = waiting.pop(0)
                    running.append((run, _start(run, jobs)))
                # Note the runs that have ended, with whatever result; the others continue.
                for run, process in [pair for pair in running if pair[1].poll() is not None]:
                    running.remove((run, process))
                    num_done += 1
                    result = "done"
                    if process.returncode != 0:
                        reason = _why_it_failed(run, process.returncode)
                        failed.append(MissingRun(run.method, run.config.seed, reason))
                        result = f"failed: {reason}"
                    run.forget_checkpoints()
                    progress(f"{num_done}/{len(planned)}  {run.path}  {result}", planned)
                progress("", planned)
                time.sleep(_POLL_SECONDS)
        finally:
            _end([process for _, process in running])
    return failed


def _end(processes: Sequence["subprocess.Popen[bytes]"]) -> None:
    """Let the runs write their checkpoints; a second Ctrl-C ends them at once."""
    for process in processes:
        process.terminate()
    # All are told before waiting for the first, so that they write in parallel.
    try:
        for process in processes:
            process.wait()
    except KeyboardInterrupt:
        for process in processes:
            process.terminate()
        raise


def _start(run: PlannedRun, jobs: int) -> "subprocess.Popen[bytes]":
    """Start the process of a new or resumed run. Ctrl-C reaches it only through this process."""
    config = run.path.with_name(f"{run.path.name}.toml")
    try:
        run.path.parent.mkdir(parents=True, exist_ok=True)
        config.write_text(dump_config(run.config), encoding="utf-8")
        log = run.log.open("wb")
    except OSError as error:
        raise UserError(
            f"{run.path.parent} cannot be written ({error.strerror}); free some space or fix its "
            "permissions, or give the comparison another directory."
        ) from None
    # In a separate session: otherwise the terminal would send Ctrl-C to each run too, and a run
    # that gets a second signal ends without a checkpoint.
    command = [sys.executable, "-m", "rlad", "train", str(config)]
    if run.directory.exists():
        command.append("--resume")
    # Parallel runs share the cores.
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))} if jobs > 1 else {}
    with log:
        return subprocess.Popen(
            command,
            env=threads | os.environ,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _why_it_failed(run: PlannedRun, code: int) -> str:
    """Find the sentence that a run ended with."""
    # Its `rlad: ...` message, or otherwise its last line, which ends a traceback.
    lines = run.log.read_text(encoding="utf-8", errors="replace").splitlines()
    said = [line for line in lines if line.strip() and line != BUG_REPORT] or ["no output"]
    sentences = [line.removeprefix("rlad: ") for line in said if line.startswith("rlad: ")]
    how = f"exit code {code}: {said[-1]}"
    if code < 0:
        how = f"killed by {signal.Signals(-code).name}"
    elif sentences:
        how = sentences[-1]
    return f"{how} (see {run.log})"
