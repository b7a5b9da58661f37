"""What a person sees of `rlad compare`: the plan, the progress over all runs, what is missing."""

import html
import re
import sys
from collections.abc import Sequence
from itertools import dropwhile, takewhile
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from rlad.cli.printing import print_line, print_table
from rlad.comparison.compare import PlannedRun, compare, final_runs, tuning_runs
from rlad.comparison.report import HTML, MARKDOWN
from rlad.config.comparison import CompareConfig
from rlad.errors import EXIT_FAILURE, EXIT_SIGNAL
from rlad.stopping import StopRequested


def run_compare(comparison: CompareConfig, folder: Path, *, dry_run: bool, command: str) -> None:
    """Do a comparison, or print its plan; exit code 1 when a run is missing from its report."""
    console = Console()
    if dry_run:
        print_plan(console, comparison, folder)
        return
    bar = Progress(
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("steps, left"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        speed_estimate_period=3600,
    )
    task = bar.add_task("")

    def progress(line: str, runs: Sequence[PlannedRun]) -> None:
        if line:
            print_line(console, line)
        total = sum(run.config.optimization.num_steps for run in runs)
        bar.update(task, total=total, completed=sum(run.steps_done() for run in runs))

    try:
        with bar:
            missing = compare(comparison, folder, progress=progress)
    except StopRequested as stopped:
        click.echo(
            f"rlad: stopped by {stopped}; what was trained is kept, continue with: {command}",
            err=True,
        )
        sys.exit(EXIT_SIGNAL + stopped.signal_number)
    for run in missing:
        print_line(console, f"missing: {run.method} seed {run.seed}: {run.reason}")
    print_results(console, Path(comparison.directory) / MARKDOWN)
    print_line(console, f"report  {Path(comparison.directory) / HTML}")
    if missing:
        sys.exit(EXIT_FAILURE)


def print_results(console: Console, report: Path) -> None:
    """Print headline and first table of a report."""
    _, _, headline, *lines = report.read_text(encoding="utf-8").splitlines()
    plain = [html.unescape(re.sub(r"\\([^\w\s])", r"\1", line)) for line in (headline, *lines)]
    print_line(console, f"\n{plain[0]}\n")
    rows = list(
        takewhile(lambda line: line[:1] == "|", dropwhile(lambda line: line[:1] != "|", plain))
    )
    print_table(console, [line.strip("| ").split(" | ") for line in rows if "---" not in line])
    print_line(console, "")


def print_plan(console: Console, comparison: CompareConfig, folder: Path) -> None:
    """Print the runs of a comparison, and which of them are done."""
    tuning = [run for runs in tuning_runs(comparison, folder).values() for run in runs]
    runs = [*tuning, *final_runs(comparison, folder, {})]
    for run in runs:
        # Before the tuning the learning rates are unknown, so settings cannot be compared.
        is_final = comparison.tuning is not None and run not in tuning
        is_done = run.directory.is_finished() if is_final else run.is_done()
        print_line(console, f"{'done ' if is_done else 'to do'}  {run.path}")
    config = runs[-1].config
    rollout = config.rollout
    print_line(
        console,
        f"{len(runs)} runs, {len(tuning)} of them to choose learning rates, {comparison.jobs} side "
        f"by side; each of {config.optimization.num_steps} steps with {rollout.prompts_per_batch} "
        f"prompts x {rollout.group_size} rollouts per batch\nreport in {comparison.directory}",
    )
