"""`rlad check`: its page and its exit code."""

import json
import sys
import textwrap

import click
from rich.console import Console
from rich.text import Text

from rlad.checks.check import CheckReport, check_run
from rlad.config.file import changed_settings
from rlad.config.run import RunConfig
from rlad.errors import EXIT_USER_MISTAKE
from rlad.text import printable

_MARKS = {"ok": ("✓", "green"), "warning": ("!", "yellow"), "error": ("✗", "red")}


def run_check(
    config: RunConfig, *, without_models: bool, engine: str | None, as_json: bool
) -> None:
    """Check a run and print what was found; exit code 2 when it cannot work."""
    with Console(stderr=True).status("checking"):
        report = check_run(config, with_models=not without_models, for_verl=engine == "verl")
    if as_json:
        click.echo(json.dumps(report.to_json()))
    else:
        print_report(report)
    if report.errors:
        sys.exit(EXIT_USER_MISTAKE)


def print_report(report: CheckReport, console: Console | None = None) -> None:
    """Print one screen: what differs from the defaults, what will be computed, findings. In a pipe
    each is one line."""
    console = console or Console(highlight=False)

    def line(text: str, style: str = "") -> None:
        width = console.width if console.is_terminal else len(text) + 1
        parts = textwrap.wrap(text, width, subsequent_indent=" " * 6, replace_whitespace=False)
        for part in parts or [""]:
            console.print(Text(printable(part), style=style), soft_wrap=True)

    def heading(text: str) -> None:
        line(text, style="bold")

    heading("settings (all others have their defaults; --json prints them all)")
    for key, value in changed_settings(report.config).items():
        line(f"  {key} = {json.dumps(value, ensure_ascii=False)}")
    heading("\nwhat will be computed")
    for text in report.plan:
        line(f"  {text}")
    heading("\nchecks")
    for finding in report.findings:
        mark, colour = _MARKS[finding.level]
        line(
            f"  {mark} {finding.subject}: {finding.message}",
            style="" if finding.level == "ok" else colour,
        )
    line("")
    if report.errors:
        line("this cannot work: fix what is marked with ✗", style="bold red")
    else:
        line("this can be trained", style="bold green")
