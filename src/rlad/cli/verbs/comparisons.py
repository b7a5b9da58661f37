"""Commands for many runs."""

import shlex
from pathlib import Path

import click

from rlad.cli.arguments import NEW_FOLDER, path_and_overrides


@click.command()
@click.argument("arguments", nargs=-1, metavar="[COMPARE.toml] [KEY=VALUE]...")
@click.option(
    "--dry-run", is_flag=True, help="Print the runs and which of them are done; do not train."
)
@click.option(
    "--plan",
    is_flag=True,
    help="Print the detectable difference, and the seeds and problems needed.",
)
@click.option(
    "--difference",
    "points",
    type=click.FloatRange(0.1, 100),
    default=5.0,
    help="For --plan: the difference to detect, in points.",
)
@click.option(
    "--pilot",
    type=click.Path(path_type=Path),
    help="For --plan: folder of a comparison, or a results.jsonl, to estimate the spread from.",
)
def compare(
    arguments: tuple[str, ...], dry_run: bool, plan: bool, points: float, pilot: Path | None
) -> None:
    """Compare methods over several seeds.

    All methods have the same budget, and one report shows them all.

    COMPARE.toml contains the methods, the seeds and the run that they share; the default is the
    embedded example. KEY=VALUE changes one setting, for example 'seeds=[0,1,2,3,4]' or jobs=2.

    Run the command again to continue an interrupted comparison. The report lists failed runs, and
    the exit code is then 1.
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
    help="Method that the others are compared with; by default grpo, or otherwise the first.",
)
@click.option(
    "--figures", type=NEW_FOLDER, help="Folder for figures (PDF, SVG) and LaTeX tables of a paper."
)
def report(runs: tuple[str, ...], output: str, baseline: str | None, figures: Path | None) -> None:
    """Write a report on existing runs.

    It has tables with intervals, learning curves, cost, and what TRRD did with each token.

    RUNS are run directories, or folders that contain some.
    """
    from rich.console import Console

    from rlad.cli.compare import print_results
    from rlad.cli.report import report_runs
    from rlad.comparison.report import MARKDOWN

    page = report_runs(runs, output, baseline, figures)
    print_results(Console(highlight=False), page.with_name(MARKDOWN))
    click.echo(f"report  {page}")
