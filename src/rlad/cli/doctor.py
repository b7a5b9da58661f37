"""What `rlad doctor` prints."""

from pathlib import Path

from rich.console import Console
from rich.text import Text

from rlad.runs.doctor import Diagnoses, diagnose
from rlad.text import printable

_MARKS = {"error": ("✗", "red"), "warning": ("!", "yellow"), "note": ("·", "")}


def diagnose_run(path: str) -> Diagnoses:
    return diagnose(Path(path))


def print_diagnoses(diagnoses: Diagnoses, console: Console | None = None) -> None:
    """The worst first, one paragraph each."""
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
