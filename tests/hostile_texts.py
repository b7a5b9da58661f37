"""Texts as a hostile model, server or file may write them (hypothesis strategies)."""

import string
from fractions import Fraction

from hypothesis import strategies as st

UNITS = (
    *"a0.-+e/*_`#$%^()[]{}<>\"'@|~&: \n\t\r\x00",
    *"\u202e\u2066\ud800\U0001f600\u0131\u0660\u00b2\u200b",
    *(",000", "1,", "1e", "1/", "**", "\\", "@a.", "://", "www.", "\x1b[31m", "\N{KELVIN SIGN}"),
    *("answer:", "Answer:", "<answer>", "</answer>", "<think>", "</think>", r"\boxed{", r"\frac{"),
    *(r"\sqrt{", "Ada is a ", "knight", "knave", " is a", "Ada is a knight, "),
    *("<script>alert(1)</script>", "{{", "}}", "{%", "token_id:9", "NaN"),
)
"""pieces that parsers of ours look for, or stumble over"""

any_text = st.text(st.characters(exclude_categories=()), max_size=60)
hostile_text = st.lists(st.sampled_from(UNITS) | any_text, max_size=12).map("".join)
long_text = st.tuples(st.sampled_from(UNITS), st.integers(1, 3000), hostile_text).map(
    lambda t: t[0] * t[1] + t[2]
)
completions = hostile_text | long_text

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**25), 10**25)
    | st.floats()
    | st.sampled_from(
        ["token_id:5", "token_id:" + "9" * 5000, "5", "logprob", "", -0.5, -9999.0, 1e-3, 0, True]
    )
    | hostile_text,
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(st.sampled_from(["5", "logprob", "choices"]) | any_text, inner)
    ),
    max_leaves=12,
)


@st.composite
def written_numbers(draw: st.DrawFn) -> tuple[str, Fraction]:
    """A number as people write it, and its value."""
    whole, form = (
        draw(st.integers(-(10**9), 10**9)),
        draw(st.sampled_from(["plain", "grouped", "decimal", "fraction", "power"])),
    )
    sign, digits = "-" if whole < 0 else "", str(abs(whole))
    match form:
        case "grouped":
            return f"{whole:,}", Fraction(whole)
        case "decimal":
            tail = draw(st.text(string.digits, min_size=1, max_size=6))
            value = Fraction(abs(whole)) + Fraction(int(tail), 10 ** len(tail))
            return f"{sign}{digits}.{tail}", -value if sign else value
        case "fraction":
            below = draw(st.integers(1, 999))
            return f"{whole}/{below}", Fraction(whole, below)
        case "power":
            power = draw(st.integers(-9, 9))
            return f"{whole}e{power}", Fraction(whole) * Fraction(10) ** power
    return str(whole), Fraction(whole)


@st.composite
def expressions(draw: st.DrawFn, depth: int = 3) -> tuple[str, Fraction | None, list[int]]:
    """An arithmetic expression, its exact value (None where it divides by zero) and the numbers in
    it."""
    if depth == 0 or draw(st.integers(0, 2)) == 0:
        number = draw(st.integers(0, 99))
        return str(number), Fraction(number), [number]
    (left, a, used), (right, b, more) = draw(expressions(depth - 1)), draw(expressions(depth - 1))
    sign = draw(st.sampled_from("+-*/"))
    value = None
    if a is not None and b is not None and not (sign == "/" and b == 0):
        value = {"+": a + b, "-": a - b, "*": a * b, "/": a / b if b else None}[sign]
    return f"({left} {sign} {right})", value, used + more
