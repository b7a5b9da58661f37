"""Verbs of many runs."""

import shlex
from pathlib import Path

import click

from rlad.cli.arguments import NEW_FOLDER, path_and_overrides


@click.command()
@click.argument("arguments", nargs=-1, metavar="[COMPARE.toml] [KEY=VALUE]...")
@click.option(
    "--dry-run", is_flag=True, help="Print the runs and which of them are done; train nothing."
)
@click.option(
    "--plan", is_flag=True, help="Say what it can see, and how many seeds and problems it takes."
)
@click.option(
    "--difference",
    "points",
    type=click.FloatRange(0.1, 100),
    default=5.0,
    help="In points, for --plan.",
)
@click.option(
    "--pilot",
    type=click.Path(path_type=Path),
    help="For --plan: a comparison's folder or results.jsonl to take the spread from.",
)
def compare(
    arguments: tuple[str, ...], dry_run: bool, plan: bool, points: float, pilot: Path | None
) -> None:
    """Find out which method works, over several seeds.

    All methods have one budget, and there is one report of them.

    COMPARE.toml names the methods, the seeds and the run that they share; without it the embedded
    example is compared. KEY=VALUE changes one setting, for example 'seeds=[0,1,2,3,4]' or jobs=2.

    A comparison that is started again continues with what is missing. A run that fails is named in
    the report, and the exit code is 1.
    """
    from rlad.config.comparison import load_comparison

    comparison, folder = load_comparison(*path_and_overrides(arguments))
    from rlad.cli.compare import plan_comparison, run_compare

    if plan:
        plan_comparison(comparison, folder, points=points, pilot=pilot)
        return
    command = shlex.join(["rlad", "compare", *arguments])
    run_compare(comparison, folder, dry_run=dry_run, command=command)


@click.command()
@click.argument("runs", nargs=-1, required=True)
@click.option(
    "--output", default="report", help="Folder for report.html, report.md and results.jsonl."
)
@click.option(
    "--baseline",
    metavar="METHOD",
    help="What the others are compared with; by default grpo, or else the first.",
)
@click.option(
    "--figures", type=NEW_FOLDER, help="Folder for figures of a paper (PDF, SVG) and LaTeX."
)
def report(runs: tuple[str, ...], output: str, baseline: str | None, figures: Path | None) -> None:
    """Make a report of runs that are there.

    Tables with intervals, learning curves, cost, and what TRRD did with each token.

    RUNS are run directories, or folders that hold some.
    """
    from rich.console import Console

    from rlad.cli.compare import print_results
    from rlad.cli.report import report_runs
    from rlad.comparison.report import MARKDOWN

    page = report_runs(runs, output, baseline, figures)
    print_results(Console(highlight=False), page.with_name(MARKDOWN))
    click.echo(f"report  {page}")
