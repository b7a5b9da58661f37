"""Text that nobody has checked (a model's, a server's, a file's), made harmless for a terminal, a
log or a page."""

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def printable(text: str) -> str:
    """Replace what steers a terminal or hides: control characters, escapes, marks that turn the
    reading direction. Line breaks and tabs stay."""
    return "".join(c if c.isprintable() or c in "\n\t" else _REPLACEMENT for c in text)
