"""`rlad check`: its output and its exit code."""

import json
import sys

import click
from rich.console import Console

from rlad.checks.check import CheckReport, check_run
from rlad.cli.printing import print_finding, print_item, print_line
from rlad.config.file import changed_settings
from rlad.config.run import RunConfig
from rlad.errors import EXIT_USER_MISTAKE


def run_check(
    config: RunConfig,
    *,
    without_models: bool,
    engine: str | None,
    ranking: int | None,
    nearest: int | None,
    force: bool,
    as_json: bool,
) -> None:
    """Check a run and print the findings. The exit code is 2 if the run cannot work."""
    with Console(stderr=True).status("checking"):
        report = check_run(
            config,
            with_models=not without_models,
            for_verl=engine == "verl",
            num_ranked_problems=ranking or 0,
            num_solved_problems=nearest or 0,
            force=force,
        )
    if as_json:
        click.echo(json.dumps(report.to_json()))
    else:
        print_report(report, Console(highlight=False))
    if report.errors:
        sys.exit(EXIT_USER_MISTAKE)


def print_report(report: CheckReport, console: Console) -> None:
    """Print the settings that differ from their defaults, what will be computed, and findings."""
    title = "settings (all others have their defaults; --json prints them all)"
    print_line(console, title, "bold")
    for key, value in changed_settings(report.config).items():
        print_item(console, f"  {key} = {json.dumps(value, ensure_ascii=False)}")
    print_line(console, "\nwhat will be computed", "bold")
    for text in report.plan:
        print_item(console, f"  {text}")
    print_line(console, "\nchecks", "bold")
    for finding in report.findings:
        print_finding(console, finding.level, finding.subject, finding.message)
    if report.errors:
        print_line(console, "\nthis cannot work: fix what is marked with ✗", "bold red")
    else:
        print_line(console, "\nthis can be trained", "bold green")
