"""Make unchecked text (from a model, a server or a file) harmless for a terminal, a log or a page,
and guess the word that a user may have meant."""

import difflib
from collections.abc import Iterable
from pathlib import Path

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def printable(text: str) -> str:
    """Replace characters that control a terminal or hide text: control characters, escapes, marks
    that change the reading direction. Line breaks and tabs stay."""
    return "".join(c if c.isprintable() or c in "\n\t" else _REPLACEMENT for c in text)


def nearest(word: str, known: Iterable[str]) -> str:
    """Ask whether the nearest of the known words was meant; empty if none is near."""
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {near[0]!r}?" if near else ""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its type's name if it has no text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def looks_like_path(name: str) -> bool:
    """Return whether a name can only be a path on this machine, not an `owner/name` on the hub: it
    exists, or its form or its first folder shows it."""
    if name.startswith(("/", ".", "~")) or name.count("/") > 1 or "\\" in name:
        return True
    return Path(name).exists() or ("/" in name and Path(name.partition("/")[0]).is_dir())
