"""Answers to mathematical problems as people and models write them, in classes of equal ones.

Answers of one class are equal, answers of two classes are not: no verifier may call them so. The
classes were made by hand, from no parser: one a line in `answer_classes.txt`.
"""

from pathlib import Path

_SEPARATOR = "  ;;  "


def rows(name: str) -> list[list[str]]:
    """The lines of a file beside this one, each as its parts."""
    text = (Path(__file__).parent / name).read_text(encoding="utf-8")
    return [line.split(_SEPARATOR) for line in text.splitlines()]


CLASSES = rows("answer_classes.txt")
