"""Splitting an answer into parts at commas, signs and brackets."""

import re

from rlad.tasks.measured_values import GROUPED

SIGNS = {
    **{sign: sign for sign in (r"\le", r"\ge", r"\ne")},
    **{"<=": r"\le", ">=": r"\ge", "!=": r"\ne", "==": "="},
    **{sign: sign for sign in ("<", ">", "=")},
}
"""The notations of relations, the longest first"""
ANGLES = {
    "l": "\N{MATHEMATICAL LEFT ANGLE BRACKET}",
    "r": "\N{MATHEMATICAL RIGHT ANGLE BRACKET}",
}
OPENING = {"(": ")", "[": "]", "{": "}", r"\{": r"\}", ANGLES["l"]: ANGLES["r"]}
_LEFT = "([{" + ANGLES["l"]
_RIGHT = ")]}" + ANGLES["r"]
_INEQUALITY = re.compile(r"[<>]|!=|\\(?:[lg]e|ne)(?![A-Za-z])")


def joined(parts: list[str], signs: list[str]) -> str:
    """Return how inequalities are joined, since x < 5 and x > 7 is not x < 5 or x > 7; "" for other
    items, and if they are joined by "or"."""
    if not any(map(_INEQUALITY.search, parts)):
        return ""
    words = {sign.strip().removeprefix(r"\text").strip("{}") for sign in signs}
    if words <= {"or", r"\lor", r"\vee"}:
        return ""
    # With a comma or a word between, x is neither 1 nor 2.
    is_unequal = all(r"\ne" in part or "!=" in part for part in parts)
    return "and" if is_unequal or "and" in words else ","


def without_group_commas(text: str) -> tuple[str, bool]:
    """Remove commas between thousands, except in brackets, where they separate coordinates."""
    depth = 0
    pieces = []
    last = 0
    found = False
    depths = []
    for character in text:
        depth += (character in _LEFT) - (character in _RIGHT)
        depths.append(depth)
    for match in GROUPED.finditer(text):
        if depths[match.start()] <= 0 and not re.match(r"\s*[,;]", text[match.end() :]):
            pieces.append(text[last : match.start()] + match[0].replace(",", ""))
            last = match.end()
            found = True
    return "".join(pieces) + text[last:], found


def split(text: str, separators: tuple[str, ...]) -> list[str]:
    """Split at separators outside of brackets."""
    return split_with_signs(text, separators)[0]


def split_with_signs(text: str, separators: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Split at separators outside of brackets, and also list these. At each place the first
    separator that matches is used."""
    # Marks of text in formulas are one character each, so positions stay the same.
    spaced = text.replace("\x02", " ").replace("\x03", " ")
    depth = 0
    parts = []
    signs = []
    start = at = 0
    while at < len(text):
        depth += (spaced[at] in _LEFT) - (spaced[at] in _RIGHT)
        depth += spaced.startswith(r"\begin", at) - spaced.startswith(r"\end{", at)
        found = next((s for s in separators if spaced.startswith(s, at)), "") if depth == 0 else ""
        if found and found[0] == "\\" and spaced[at + len(found) : at + len(found) + 1].isalpha():
            found = ""
        if not found:
            at += 1
            continue
        parts.append(text[start:at].strip())
        signs.append(found)
        start = at = at + len(found)
    return [*parts, text[start:].strip()], signs


def inside(text: str, opening: str) -> tuple[str, str]:
    """Return the content of brackets around the whole text, and the closing bracket; "" and "" if
    they end earlier."""
    depth = 0
    for at, character in enumerate(text):
        depth += (character in _LEFT) - (character in _RIGHT)
        if depth == 0 and at >= len(opening) - 1:
            if at != len(text) - 1:
                return "", ""
            closing = r"\}" if text.endswith(r"\}") else character
            return text[len(opening) : len(text) - len(closing)], closing
    return "", ""
