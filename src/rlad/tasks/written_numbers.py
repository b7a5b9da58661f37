"""The notations of one number, and its exact value: `-1,000`, `.5`, `3 1/2`, `1e-3`,
`\\frac{3}{4}`."""

import ast
import operator
import re
from collections.abc import Callable
from fractions import Fraction

from rlad.tasks.notation import words

_MAX_NUMBER_CHARACTERS = 500
_MAX_EXPRESSION_CHARACTERS = 500
_ARITHMETIC = re.compile(r"[0-9+\-*/()\s]*")  # no comments, no 0x3
_OPERATORS: dict[type, Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_GROUPED = (
    r"[0-9]{1,3}(?:,[0-9]{3})++(?![0-9]|,[0-9])"  # 1,234,567
    r"|[0-9]{1,2}(?:,[0-9]{2})+,[0-9]{3}(?![0-9]|,[0-9])"  # 12,34,567 of India
)
_DECIMAL = rf"(?:(?:{_GROUPED}|[0-9]++)(?:\.[0-9]++)?+|\.[0-9]++)"
_EUROPEAN = r"[0-9]{1,3}(?:\.[0-9]{3})++,[0-9]++|[0-9]{1,3}(?:\.[0-9]{3}){2,}+(?![0-9.])"
_POWER_OF_TEN = (
    r"(?:[eE][-+]?[0-9]{1,3}(?![\w.])"
    r"|\s?(?:\\times|\\cdot|[xX*])\s{0,3}10\s?(?:\^|\*\*)\s?(?:\{\s?[-+]?[0-9]{1,3}\s?\}"
    r"|[-+]?[0-9]{1,3}(?![\w.]))(?![0-9]))?+"
)
NUMBER = re.compile(
    r"(?P<sign>(?<![\w)\]}.])(?<![0-9)\]}]\s)(?:[-+]|(?<![\w)\]}.]\s)[-+]\s))?+(?:"
    r"(?P<mixed>[0-9]{1,9}\s?(?=\\frac|[0-9]++\s?/)(?<=[\s0-9]))?+"
    r"(?:\\frac\s?(?:\{\s?(?P<above>-?[0-9,.]++)\s?\}\s?\{\s?(?P<below>[0-9,.]++)\s?\}"
    r"|(?P<a>[0-9])\s?(?P<b>[0-9])(?![0-9])))"
    rf"|(?P<whole>[0-9]{{1,9}})\s(?P<numerator>[0-9]{{1,9}})\s?/\s?(?P<denominator>[0-9]{{1,9}})"
    rf"(?![0-9.,/])|(?P<european>{_EUROPEAN})"
    rf"|(?P<decimal>{_DECIMAL})(?P<power>{_POWER_OF_TEN})"
    rf"(?:\s?/\s?(?P<divisor>{_DECIMAL}))?+)"
)


SPELT = {
    word: value
    for value, word in enumerate(
        words(
            "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
            "fifteen sixteen seventeen eighteen nineteen"
        )
    )
} | {
    word: 10 * tens
    for tens, word in enumerate(
        words("twenty thirty forty fifty sixty seventy eighty ninety hundred"), 2
    )
}
"""Numbers that are one word"""
_WORD = rf"(?:{'|'.join((*SPELT, 'thousand', 'million'))})\b"
_SPELT_OUT = re.compile(
    rf"(?<!\w)(?<![0-9]\s)(?P<sign>(?:negative|(?<=is\s)minus)\s++)?"
    rf"(?P<words>{_WORD}(?:(?:[-\s\u2013]|(?:(?<=hundred)|(?<=thousand))\sand\s){_WORD})*+)(?![-\w])"
    # Two thirds, two and a half, two dozen.
    r"(?!\s(?:hal(?:f|ves)|thirds?|quarters?|[a-z]+ths?\b|and an?\s|point|dozens?|billions?))",
    re.IGNORECASE,
)
_ONE_IS_STATED = re.compile(r"\b(?:is|equals)\s+one\s*(?:[.!?;]|$)", re.IGNORECASE)


def in_digits(text: str) -> str:
    """Write whole numbers that are words in digits: `two hundred and five` is `205`. `one` alone is
    a number only at the end of a statement: this is the one, the answer is one."""
    return _SPELT_OUT.sub(_digits, text)


def _digits(spelt: re.Match[str]) -> str:
    found = re.findall("[a-z]+", spelt["words"].casefold())
    around = spelt.string[max(0, spelt.start() - 10) : spelt.end() + 3]
    if found == ["one"] and not _ONE_IS_STATED.search(around):
        return spelt[0]
    value = part = 0
    for word in found:
        if word in ("thousand", "million"):
            value += max(part, 1) * {"thousand": 1_000, "million": 1_000_000}[word]
            part = 0
        elif word == "hundred":
            part = max(part, 1) * 100
        elif word != "and":
            place = 10 if SPELT[word] < 10 else 100
            if part % place:  # two three
                return spelt[0]
            part += SPELT[word]
    return f"{'-' if spelt['sign'] else ''}{value + part}"


def value_of(number: re.Match[str]) -> Fraction | None:
    """Compute a number exactly; None if it is too long or divides by zero."""
    if len(number[0]) > _MAX_NUMBER_CHARACTERS:
        return None
    groups = {name: text.replace(",", "") for name, text in number.groupdict().items() if text}
    try:
        if "above" in groups or "a" in groups:
            above, below = (groups.get("above"), groups.get("below"))
            value = Fraction(above or groups["a"]) / Fraction(below or groups["b"])
            if "mixed" in groups:
                value = _mixed(groups["mixed"], value)
        elif "whole" in groups:
            value = Fraction(groups["numerator"]) / Fraction(groups["denominator"])
            value = _mixed(groups["whole"], value)
        elif "european" in groups:
            whole, _, tail = number["european"].partition(",")
            value = Fraction(f"{whole.replace('.', '')}.{tail or '0'}")
        else:
            value = Fraction(groups["decimal"])
            if power := groups.get("power", ""):
                exponent = re.findall(r"[-+]?[0-9]+", power)[-1]
                value *= Fraction(10) ** int(exponent)
            value /= Fraction(groups.get("divisor", "1"))
    except (ValueError, ZeroDivisionError):
        return None
    return -value if value is not None and groups.get("sign", "").startswith("-") else value


def _mixed(whole: str, part: Fraction) -> Fraction | None:
    """Add a proper fraction to a whole number; 3 5/2 is none."""
    return int(whole) + part if 0 < part < 1 else None


def evaluate_arithmetic(expression: str) -> tuple[Fraction, list[int]] | None:
    """Compute the exact value of an expression of whole numbers, + - * / and parentheses, and list
    the numbers used in it.

    Return None for anything else, such as powers, names and calls. The text is parsed, never
    executed.
    """

    def value(node: ast.expr) -> Fraction:
        match node:
            case ast.Constant(value=int(number)) if not isinstance(number, bool):
                numbers.append(number)
                return Fraction(number)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -value(operand)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
                return _OPERATORS[type(op)](value(left), value(right))
        raise SyntaxError("not arithmetic")

    # Long and deeply nested texts can exhaust the parser's memory or stack.
    numbers: list[int] = []
    if len(expression) > _MAX_EXPRESSION_CHARACTERS or not _ARITHMETIC.fullmatch(expression):
        return None
    try:
        return value(ast.parse(expression.strip(), mode="eval").body), numbers
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None
