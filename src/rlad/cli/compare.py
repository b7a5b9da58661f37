"""The output of `rlad compare`: the plan, the progress over all runs, and missing runs."""

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
from rlad.comparison.plan import OUR_SOURCE, OUR_SPREAD, Plan, read_pilot
from rlad.comparison.report import HTML, MARKDOWN
from rlad.config.comparison import CompareConfig, method_config
from rlad.errors import EXIT_FAILURE, EXIT_SIGNAL, UserError
from rlad.stopping import StopRequested


def run_compare(comparison: CompareConfig, folder: Path, *, dry_run: bool, command: str) -> None:
    """Run a comparison, or print its plan. The exit code is 1 if a run is missing from the
    report."""
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
            f"rlad: stopped by {stopped}; all trained steps are kept, continue with: {command}",
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
    """Print the verdict and the first table of a report."""
    _, _, *lines = report.read_text(encoding="utf-8").splitlines()
    plain = [html.unescape(re.sub(r"\\([^\w\s])", r"\1", line)) for line in lines]
    verdict = takewhile(lambda line: not line.startswith("## "), plain)
    print_line(console, "\n" + "\n".join(line.replace("**", "") for line in verdict))
    rows = list(
        takewhile(lambda line: line[:1] == "|", dropwhile(lambda line: line[:1] != "|", plain))
    )
    print_table(console, [line.strip("| ").split(" | ") for line in rows if "---" not in line])
    print_line(console, "")


def plan_comparison(
    comparison: CompareConfig, folder: Path, *, points: float, pilot: Path | None
) -> None:
    """Print which difference the planned comparison can detect, and how many seeds and problems are
    needed to detect a difference of `points`."""
    console = Console(highlight=False)
    found = None
    if pilot is not None:
        found = read_pilot(pilot, comparison.baseline)
        if found is None:
            raise UserError(
                f"--pilot {pilot} has no two methods that share two finished seeds, at "
                "METHOD/seed-N or as rows of a results.jsonl; give one that has, or leave it out."
            )
    else:
        found = read_pilot(Path(comparison.directory), comparison.baseline)
    spread, source = found or (OUR_SPREAD, OUR_SOURCE)
    config = method_config(comparison, folder, next(iter(comparison.methods)), seed=0)
    evaluation = config.evaluation
    plan = Plan(
        source,
        spread,
        len(comparison.seeds),
        evaluation.num_test_problems,
        evaluation.num_test_samples,
        points / 100,
    )
    _print_sight(console, plan, len(comparison.methods))


def _print_sight(console: Console, plan: Plan, num_methods: int) -> None:
    wanted = f"{100 * plan.wanted:g} points"
    runs = f"{plan.seeds} seeds x {num_methods} methods"
    problems = f"{plan.problems:,} test problems"
    if plan.sees is None:
        text = "With one seed it can detect no difference: the spread over seeds is unknown."
    else:
        text = f"It can detect {100 * plan.sees:.1f} points (power 80 %, significance level 5 %)."
    print_line(console, f"As planned: {runs}, {problems} x {plan.completions} completions.")
    print_line(console, text, "bold")
    print_line(console, f"\nTo detect {wanted}:")
    for number, what, of in (
        (plan.seeds_needed, f"seeds with {problems}", "problems vary too much"),
        (plan.problems_needed, f"test problems with {plan.seeds} seeds", "seeds vary too much"),
    ):
        said = f"{number:,} {what}" if number is not None else f"no number of {what} will do: {of}"
        print_line(console, f"  {said}")
    print_line(console, "\nSmallest detectable difference, in points:")
    print_table(console, plan.table())
    s = plan.spread
    print_line(
        console,
        f"\nBased on {plan.source}.\nSpread of a difference: over seeds {100 * s.seed:.1f} points, "
        f"over problems {100 * s.problem:.1f}, of one completion {100 * s.completion:.0f}. With "
        "several comparisons at once (Holm), differences must be slightly larger.",
        "dim",
    )


def print_plan(console: Console, comparison: CompareConfig, folder: Path) -> None:
    """Print the runs of a comparison, and which of them are done."""
    tuning = [run for runs in tuning_runs(comparison, folder).values() for run in runs]
    runs = [*tuning, *final_runs(comparison, folder, {})]
    for run in runs:
        # Learning rates are unknown before the tuning, so the settings cannot be compared.
        is_final = comparison.tuning is not None and run not in tuning
        is_done = run.directory.is_finished() if is_final else run.is_done()
        print_line(console, f"{'done ' if is_done else 'to do'}  {run.path}")
    config = runs[-1].config
    rollout = config.rollout
    print_line(
        console,
        f"{len(runs)} runs ({len(tuning)} to choose learning rates), {comparison.jobs} in "
        f"parallel; each has {config.optimization.num_steps} steps with "
        f"{rollout.prompts_per_batch} prompts x {rollout.group_size} rollouts per batch\n"
        f"report in {comparison.directory}",
    )
