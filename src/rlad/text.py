"""Text that nobody has checked (a model's, a server's, a file's), made harmless for a terminal, a
log or a page, and the word that a user may have meant."""

import difflib
from collections.abc import Iterable
from pathlib import Path

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def printable(text: str) -> str:
    """Replace what steers a terminal or hides: control characters, escapes, marks that turn the
    reading direction. Line breaks and tabs stay."""
    return "".join(c if c.isprintable() or c in "\n\t" else _REPLACEMENT for c in text)


def nearest(word: str, known: Iterable[str]) -> str:
    """Ask whether the nearest of the known words was meant; empty where none is near."""
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {near[0]!r}?" if near else ""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text; its type's name where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def looks_like_path(name: str) -> bool:
    """Whether a name can only be meant as a path on this machine, and is no `owner/name` of a hub:
    it exists, or its form or its first folder says so."""
    if name.startswith(("/", ".", "~")) or name.count("/") > 1 or "\\" in name:
        return True
    return Path(name).exists() or ("/" in name and Path(name.partition("/")[0]).is_dir())
