"""How commands print: control characters in unchecked text are escaped, and lines are not wrapped
in a pipe."""

import textwrap
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from rlad.text import printable

_MARKS = {"ok": ("✓", ""), "note": ("·", ""), "warning": ("!", "yellow"), "error": ("✗", "red")}


def print_line(console: Console, text: str, style: str = "") -> None:
    """Print a text as it is."""
    console.print(Text(printable(text), style=style), soft_wrap=True)


def print_item(console: Console, text: str, style: str = "") -> None:
    """Print one item of a list. On a terminal it is wrapped, and further lines are indented."""
    width = console.width if console.is_terminal else len(text) + 1
    for line in textwrap.wrap(text, width, subsequent_indent=" " * 6, replace_whitespace=False):
        print_line(console, line, style)


def print_finding(console: Console, level: str, subject: str, message: str) -> None:
    """Print a finding with the mark and the colour of its level."""
    mark, colour = _MARKS[level]
    print_item(console, f"  {mark} {subject}: {message}", colour)


def print_table(console: Console, rows: Sequence[Sequence[str]]) -> None:
    """Print rows with aligned columns."""
    texts = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    for row in texts:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        print_line(console, "  ".join(cells).rstrip())
