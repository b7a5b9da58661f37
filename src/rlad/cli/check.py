"""`rlad check`: the page that it prints."""

from __future__ import annotations

import json
import textwrap
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from rlad.checks.check import CheckReport
from rlad.config.file import changed_settings
from rlad.text import printable

if TYPE_CHECKING:
    pass


_MARKS = {"ok": ("✓", "green"), "warning": ("!", "yellow"), "error": ("✗", "red")}


def print_report(report: CheckReport, console: Console | None = None) -> None:
    """One screen: what differs from the defaults, what will be computed, findings. In a pipe each
    is one line."""
    console = console or Console(highlight=False)

    def line(text: str, style: str = "") -> None:
        width = console.width if console.is_terminal else len(text) + 1
        for part in textwrap.wrap(
            text, width, subsequent_indent=" " * 6, replace_whitespace=False
        ) or [""]:
            console.print(Text(printable(part), style=style), soft_wrap=True)

    line("settings (all others have their defaults; --json prints them all)", style="bold")
    for key, value in changed_settings(report.config).items():
        line(f"  {key} = {json.dumps(value, ensure_ascii=False)}")
    line("")
    line("what will be computed", style="bold")
    for text in report.plan:
        line(f"  {text}")
    line("")
    line("checks", style="bold")
    for finding in report.findings:
        mark, colour = _MARKS[finding.level]
        line(
            f"  {mark} {finding.subject}: {finding.message}",
            style="" if finding.level == "ok" else colour,
        )
    line("")
    if report.errors:
        line("this cannot work: mend what is marked with ✗", style="bold red")
    else:
        line("this can be trained", style="bold green")
