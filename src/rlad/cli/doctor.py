"""`rlad doctor`: what is printed of a diagnosis."""

import json
import sys
from pathlib import Path

import click
from rich.console import Console
from rich.text import Text

from rlad.errors import EXIT_FAILURE
from rlad.runs.doctor import Diagnoses, diagnose
from rlad.text import printable

_MARKS = {"error": ("✗", "red"), "warning": ("!", "yellow"), "note": ("·", "")}


def run_doctor(path: str, *, as_json: bool) -> None:
    """Print what is wrong with a run; exit code 1 when something is."""
    diagnoses = diagnose(Path(path))
    if as_json:
        click.echo(json.dumps(diagnoses.to_json()))
    else:
        print_diagnoses(diagnoses)
    if not diagnoses.is_healthy:
        sys.exit(EXIT_FAILURE)


def print_diagnoses(diagnoses: Diagnoses, console: Console | None = None) -> None:
    """Print the worst first, one paragraph each."""
    console = console or Console(highlight=False)

    def line(text: str, style: str = "") -> None:
        console.print(Text(printable(text), style=style), soft_wrap=not console.is_terminal)

    line(f"{diagnoses.run}: {diagnoses.state}", style="bold")
    for each in diagnoses.found:
        mark, colour = _MARKS[each.level]
        line(f"  {mark} {each.name.replace('_', ' ')}: {each.message}", style=colour)
    wrong = sum(each.level != "note" for each in diagnoses.found)
    if diagnoses.is_healthy:
        line("nothing is wrong with it", style="bold green")
    else:
        line(
            f"{wrong} {'thing is' if wrong == 1 else 'things are'} wrong with it", style="bold red"
        )
