"""The tokens of formulas, with functions and Greek letters."""

import re
from typing import Any

import sympy

from rlad.tasks.notation import words

FUNCTIONS: dict[str, Any] = {
    name: getattr(sympy, name)
    for name in words("sin cos tan cot sec csc sinh cosh tanh coth asin acos atan exp")
} | {
    "arcsin": sympy.asin,
    "arccos": sympy.acos,
    "arctan": sympy.atan,
    "ln": sympy.log,
    "log": None,
    "lg": lambda x: sympy.log(x, 10),
    "lb": lambda x: sympy.log(x, 2),
    "abs": sympy.Abs,
}
INVERSES = {
    "sin": sympy.asin,
    "cos": sympy.acos,
    "tan": sympy.atan,
    "sinh": sympy.asinh,
    "cosh": sympy.acosh,
    "tanh": sympy.atanh,
}
GREEK = frozenset(
    words(
        "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda "
        "mu nu xi rho varrho sigma tau upsilon phi varphi chi psi omega Gamma Delta Theta "
        "Lambda Xi Pi Sigma Phi Psi Omega ell hbar"
    )
)
_TOKEN = re.compile(
    r"\s*(?:(?P<number>[0-9]+\.(?=\s*\\overline)|[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
    r"|(?P<command>\\(?:[A-Za-z]+|[{}|%$&]))|(?P<word>[A-Za-z]+)|(?P<sign>\*\*|!!|.))",
    re.DOTALL,
)


class Unreadable(Exception):
    """The error for a text that is not a formula or is ambiguous."""


def tokens_of(text: str) -> list[tuple[str, str, bool]]:
    """List the tokens of a formula: kind, text, and whether white space comes before."""
    tokens = []
    for match in _TOKEN.finditer(text.strip()):
        kind = match.lastgroup or ""
        piece = match[kind]
        is_apart = match[0][:1].isspace()
        if kind == "word" and piece not in FUNCTIONS and piece not in ("sqrt", "pi"):
            # Up to three adjacent letters are variables, longer words are not.
            if len(piece) > 3:
                raise Unreadable(piece)
            tokens += [("letter", letter, is_apart) for letter in piece]
        elif kind == "word":
            tokens.append(("command", "\\" + piece, is_apart))
        else:
            tokens.append((kind, piece, is_apart))
    return tokens
