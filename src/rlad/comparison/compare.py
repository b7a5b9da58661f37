"""Several methods x several seeds under one budget: tune, train what is missing, report.

    DIRECTORY/runs/METHOD/seed-N/               a run directory; its console output in seed-N.log
    DIRECTORY/tuning/METHOD/lr-X/seed-N/        the runs that chose the learning rate
    DIRECTORY/report.html, report.md, results.jsonl

Each run is a process of its own, so one that fails or is killed takes no other with it; a
comparison that is started again continues with what is missing.
"""

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from rlad.comparison.comparison_file import write_comparison_file
from rlad.comparison.report import HTML, write_report
from rlad.comparison.runs import MissingRun, ReportedRun
from rlad.config.comparison import CompareConfig, folder_name, method_config
from rlad.config.file import differing_settings, dump_config, load_config
from rlad.config.run import EvaluationConfig, RunConfig
from rlad.errors import UserError
from rlad.runs.directory import EVAL, METRICS, RunDirectory
from rlad.stopping import Stop

_POLL_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """One run of the comparison: its method, its config, and where it lies."""

    method: str
    config: RunConfig
    path: Path

    @property
    def directory(self) -> RunDirectory:
        return RunDirectory(self.path)

    def beside(self, suffix: str) -> Path:
        return self.path.with_name(self.path.name + suffix)

    def steps_done(self) -> int:
        metrics = self.path / METRICS
        return metrics.read_bytes().count(b"\n") if metrics.is_file() else 0

    def is_done(self) -> bool:
        """Whether it came to its end. `UserError` when another run lies in its place."""
        if not self.directory.exists():
            return False
        try:
            stored = load_config(self.path)
        except UserError:  # of a damaged run, which its own process then says
            return False
        differing = differing_settings(stored, self.config)
        if differing:
            raise UserError(
                f"{self.path} holds a run with other settings than this comparison wants of "
                f"{self.method!r} "
                f"({'; '.join(differing)}); choose another directory for the comparison, or delete "
                "that run."
            )
        return self.directory.is_finished()


@dataclass(frozen=True, slots=True)
class Comparison:
    """What came of a comparison: where the report is, and what is missing from it."""

    report: Path
    missing: Sequence[MissingRun]


Progress = Callable[[str, Sequence[PlannedRun]], None]
"""Is told now and then: a line to print (or ""), and the runs of the present stage."""


def compare(
    comparison: CompareConfig, folder: Path, *, progress: Progress = lambda line, runs: None
) -> Comparison:
    """Do what is missing of a comparison and write its report. `folder` is where the paths of its
    config start from.

    Raises `UserError` when a run directory of it holds another run or cannot be written, and
    `StopRequested` after Ctrl-C or SIGTERM, when the runs in progress have written their
    checkpoints.
    """
    root = Path(comparison.directory)
    rates, notes, missing = _tune(comparison, folder, progress)
    planned = [
        run
        for run in final_runs(comparison, folder, rates)
        if comparison.tuning is None or run.method in rates
    ]
    missing += _train(planned, comparison.jobs, progress)
    finished = [ReportedRun(run.method, run.path) for run in planned if run.directory.is_finished()]
    finished.sort(key=lambda run: list(comparison.methods).index(run.method))
    title, baseline = f"Comparison {root.name}", comparison.baseline
    write_comparison_file(
        root, {folder_name(method): method for method in comparison.methods}, notes, baseline
    )
    return Comparison(
        root / HTML,
        write_report(finished, root, missing=missing, title=title, notes=notes, baseline=baseline),
    )


def final_runs(
    comparison: CompareConfig, folder: Path, rates: Mapping[str, float]
) -> list[PlannedRun]:
    """The runs that are reported, seed by seed, with the learning rates that were chosen for some
    methods."""
    runs = []
    for seed in comparison.seeds:
        for method in comparison.methods:
            config = method_config(comparison, folder, method, seed=seed)
            path = Path(comparison.directory) / "runs" / folder_name(method) / f"seed-{seed}"
            runs.append(_planned(method, config, path, rates.get(method), config.evaluation))
    return runs


def tuning_runs(
    comparison: CompareConfig, folder: Path
) -> dict[tuple[str, float], list[PlannedRun]]:
    """The runs that choose the learning rates: (method, learning rate) -> one for each tuning
    seed."""
    tuning = comparison.tuning
    grid: dict[tuple[str, float], list[PlannedRun]] = {}
    for rate in tuning.learning_rates if tuning else ():
        for method in comparison.methods:
            for seed in tuning.seeds if tuning else ():
                config = method_config(comparison, folder, method, seed=seed)
                path = (
                    Path(comparison.directory)
                    / "tuning"
                    / folder_name(method)
                    / f"lr-{rate:g}"
                    / f"seed-{seed}"
                )
                # The test split is not looked at: one problem is the least that a run tests itself
                # on.
                blind = config.evaluation.model_copy(
                    update={"num_test_problems": 1, "num_test_samples": 1, "ood_task": {}}
                )
                grid.setdefault((method, rate), []).append(
                    _planned(method, config, path, rate, blind)
                )
    return grid


def _planned(
    method: str,
    config: RunConfig,
    path: Path,
    learning_rate: float | None,
    evaluation: EvaluationConfig,
) -> PlannedRun:
    rate = {} if learning_rate is None else {"learning_rate": learning_rate}
    loop = config.optimization.model_copy(update=rate)
    settings = {"run_dir": str(path), "optimization": loop, "evaluation": evaluation}
    return PlannedRun(method, config.model_copy(update=settings), path)


def _tune(
    comparison: CompareConfig, folder: Path, progress: Progress
) -> tuple[dict[str, float], list[str], list[MissingRun]]:
    """The learning rate of each method, what the report says of the search, and the methods for
    which it failed."""
    tuning = comparison.tuning
    if tuning is None:
        return {}, [], []
    grid = tuning_runs(comparison, folder)
    failed = _train([run for runs in grid.values() for run in runs], comparison.jobs, progress)
    rates: dict[str, float] = {}
    tried, seeds = (
        ", ".join(f"{rate:g}" for rate in tuning.learning_rates),
        ", ".join(map(str, tuning.seeds)),
    )
    lines = [
        f"Learning rate of each method: the best of {tried} by pass@1 on the validation split "
        "behind the last step, mean over "
        f"seeds {seeds}; the same search for all."
    ]
    for method in comparison.methods:
        scores = {rate: _validation(grid[method, rate]) for rate in sorted(tuning.learning_rates)}
        found = {rate: score for rate, score in scores.items() if score is not None}
        if found:
            rates[method] = max(found, key=lambda rate: (found[rate], -rate))
        shown = ", ".join(
            f"{rate:g}: {'failed' if score is None else f'{score:.1%}'}"
            for rate, score in scores.items()
        )
        lines.append(f"{method}: {rates.get(method, math.nan):g} (validation {shown})")
    missing = [
        MissingRun(run.method, run.seed, f"while its learning rate was tuned: {run.reason}")
        for run in failed
    ]
    return rates, lines, missing


def _validation(runs: Sequence[PlannedRun]) -> float | None:
    """Validation pass@1 behind the last step, mean over seeds; None when a run is missing."""
    if not all(run.directory.is_finished() for run in runs):
        return None
    return mean(_last_validation(run.directory) for run in runs)


def _last_validation(run: RunDirectory) -> float:
    return [row["pass@1"]["mean"] for row in run.read(EVAL) if row["split"] == "validation"][-1]


def _train(planned: Sequence[PlannedRun], jobs: int, progress: Progress) -> list[MissingRun]:
    """Train those runs that are not done, `jobs` side by side; returns those that failed."""
    waiting = [run for run in planned if not run.is_done()]
    running: list[tuple[PlannedRun, subprocess.Popen[bytes]]] = []
    failed: list[MissingRun] = []
    stop, num_done = Stop(), len(planned) - len(waiting)
    progress(f"{num_done} of {len(planned)} runs are done already" if num_done else "", planned)
    with stop.on_signals():
        try:
            while waiting or running:
                stop.check()
                while waiting and len(running) < jobs:
                    run = waiting.pop(0)
                    running.append((run, _start(run, jobs)))
                for run, process in [pair for pair in running if pair[1].poll() is not None]:
                    running.remove((run, process))
                    num_done += 1
                    reason = _why_it_failed(run, process.returncode)
                    if reason:
                        failed.append(MissingRun(run.method, run.config.seed, reason))
                    progress(
                        f"{num_done}/{len(planned)}  {run.path}  "
                        f"{f'failed: {reason}' if reason else 'done'}",
                        planned,
                    )
                progress("", planned)
                time.sleep(_POLL_SECONDS)
        finally:
            _end([process for _, process in running])
    return failed


def _end(processes: Sequence["subprocess.Popen[bytes]"]) -> None:
    """Let the runs write their checkpoints; a second Ctrl-C ends them at once."""
    for process in processes:
        process.terminate()
    try:
        for process in processes:
            process.wait()
    except KeyboardInterrupt:
        for process in processes:
            process.terminate()
        raise


def _start(run: PlannedRun, jobs: int) -> "subprocess.Popen[bytes]":
    """The process of a run that begins or goes on; Ctrl-C reaches it through us alone."""
    config = run.beside(".toml")
    try:
        run.path.parent.mkdir(parents=True, exist_ok=True)
        config.write_text(dump_config(run.config), encoding="utf-8")
        log = run.beside(".log").open("wb")
    except OSError as error:
        raise UserError(
            f"{run.path.parent} cannot be written ({error.strerror}); free some space or mend its "
            "permissions, or give the "
            "comparison another directory."
        ) from None
    command = [sys.executable, "-m", "rlad", "train", str(config)]
    if run.directory.exists():
        command.append("--resume")
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
    """The sentence that a run ended with; empty when it came to its end."""
    if code == 0:
        return ""
    said = [
        line
        for line in run.beside(".log").read_text(encoding="utf-8", errors="replace").splitlines()
        if line.strip()
    ]
    if code < 0:
        how = f"killed by {signal.Signals(-code).name}"
    else:
        sentences = [line.removeprefix("rlad: ") for line in said if line.startswith("rlad: ")]
        how = (
            sentences[-1] if sentences else f"exit code {code}: {said[-1] if said else 'no output'}"
        )
    return f"{how} (see {run.beside('.log')})"
