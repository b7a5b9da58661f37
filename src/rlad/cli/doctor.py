"""`rlad doctor`: the output of a diagnosis."""

import json
import sys
from pathlib import Path

import click
from rich.console import Console

from rlad.cli.printing import print_finding, print_line
from rlad.errors import EXIT_FAILURE
from rlad.runs.doctor import diagnose


def run_doctor(path: str, *, as_json: bool) -> None:
    """Print what is wrong with a run, the worst first. The exit code is 1 if something is."""
    diagnoses = diagnose(Path(path))
    if as_json:
        click.echo(json.dumps(diagnoses.to_json()))
    else:
        console = Console(highlight=False)
        print_line(console, f"{diagnoses.run}: {diagnoses.state}", "bold")
        for each in diagnoses.found:
            print_finding(console, each.level, each.name.replace("_", " "), each.message)
        wrong = sum(each.level != "note" for each in diagnoses.found)
        if diagnoses.is_healthy:
            print_line(console, "nothing is wrong with it", "bold green")
        else:
            things = "thing is" if wrong == 1 else "things are"
            print_line(console, f"{wrong} {things} wrong with it", "bold red")
    if not diagnoses.is_healthy:
        sys.exit(EXIT_FAILURE)
