r"""A parser of answers to mathematical problems: a value with its unit, several values, an
interval, an equation, a time, a text, ..., or a text that cannot be read.

Every part of a text counts: `7 \text{ a.m.}` is not 7, and `1010_3` is not 1010.
"""

import re
from dataclasses import replace

import sympy

from rlad.tasks.answer_kinds import (
    Answer,
    Equation,
    Interval,
    Matrix,
    NotRead,
    Several,
    Text,
    Value,
    as_interval,
)
from rlad.tasks.answers import IDLE_NAMES
from rlad.tasks.denials import is_denied, is_struck, without_denied_values
from rlad.tasks.formulas import Unreadable
from rlad.tasks.measured_values import GROUPED, plain_text, read_value
from rlad.tasks.notation import plain_notation
from rlad.tasks.numbers import ELLIPSIS, without_remarks
from rlad.tasks.quantities import same_quantity
from rlad.tasks.separators import (
    ANGLES,
    OPENING,
    SIGNS,
    inside,
    joined,
    split,
    split_with_signs,
    without_group_commas,
)
from rlad.tasks.units import UNITS
from rlad.tasks.whole_answers import RUN_OF_NUMBERS, read_whole

_MAX_CHARACTERS = 2_000


_UNIT_TEXT = "\x02{}\x03"
_SETTING = re.compile(
    r"\\(?:text|textbf|textit|textrm|textsf|texttt|textnormal|mathrm|mathsf|mathtt|operatorname"
    r"|mbox|hbox|emph|textup|mathit|mathbf)\s*\{([^{}]*)\}"
)
_BOXED = re.compile(r"^\\(?:boxed|fbox)\s*\{(.*)\}$", re.DOTALL)
_INTRODUCED = re.compile(
    r"^(?:[^=<>]*?[\s,.])?(?:is|are|equals|was|were|gives|get|have|has|be|equal to|becomes)\b"
    r"(?P<rest>\s+\S.*)$|^[^\d=<>\\]*:\s+(?P<after>\S.*)$|^(?:so|thus|hence|therefore|then)\b,?"
    r"(?P<then>\s.*)$",
    re.IGNORECASE | re.DOTALL,
)
_ABOUT = re.compile(
    r"^(?:(?:about|approximately|roughly|around|exactly|only|just|simply|the|also|now|then|thus"
    r"|therefore|equal to|approx\.?|ca\.?)\s+|\\(?:approx|sim)(?![A-Za-z])\s*)",
    re.IGNORECASE,
)
_BOUNDS = [
    (re.compile(rf"^(?:{words})\s+(?=[-+.\d\\(])", re.IGNORECASE), sign)
    for words, sign in (
        ("at least|no less than|no fewer than|minimum of", r"\ge "),
        ("at most|no more than|up to|maximum of", r"\le "),
        ("less than|fewer than|below|under|smaller than", "<"),
        ("greater than|more than|over|above|larger than", ">"),
    )
]
_MATRIX = re.compile(
    r"^\\begin\{([pbBvV]?matrix|array)\}(?:\{[lcr|]*\})?(.*)\\end\{\1\}$", re.DOTALL
)
_NAME = re.compile(
    r"^(?:\\?[A-Za-z]+'?(?:_(?:\w|\{[^{}]*\}))?'?(?:\s*\([A-Za-z](?:\s*,\s*[A-Za-z])*\))?"
    r"|(?:[PEfgh]|Pr|Var|Cov|gcd|lcm|max|min)\s*[(\[][^()\[\]]*[)\]]"
    r"|\(\s*[A-Za-z](?:_\w)?(?:\s*,\s*[A-Za-z](?:_\w)?)+\s*\)"
    r"|\|?(?:\\(?:angle|triangle|overline|vec)\s*)?\{?[A-Z]{1,4}\}?\|?|[A-Za-z][A-Za-z ]*)$"
)
_TYPED_TIMES = re.compile(r"(?<=[0-9])\s*[xX]\s*(?=10\s*\^)|(?<=[0-9])\s+[xX]\s+(?=[0-9])")
# A dash at the beginning, directly before a number, is a minus; one between two may be "to".
_LEADING_DASH = re.compile("^(\\s*)[\N{EN DASH}\N{FIGURE DASH}](?=[0-9.\\\\])")
_BRACED_SIGN = re.compile(r"(?<![\^_])\{\s*([-+])\s*\}")
_CODE_BEFORE = re.compile(r"^\s*([A-Z]{3})\s*(-?[0-9][0-9.,]*)\s*$")
_FLIPPED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}


def read_answer(text: str) -> Answer:
    """Read an answer. "... is" or a colon may introduce it."""
    if len(text) > _MAX_CHARACTERS or is_struck(text) or ELLIPSIS.search(text):
        return NotRead(text)
    prepared = _prepared(text)
    written = " ".join(prepared.replace("\x02", " ").replace("\x03", " ").split())
    try:
        return _read(prepared)
    except Unreadable as error:
        reason = str(error)
        return NotRead(written, is_false=reason == _FALSE, is_denied=reason == _DENIED)
    except (ArithmeticError, ValueError, TypeError, AttributeError, RecursionError):
        return NotRead(written)


_FALSE = "it says that different numbers are equal"
_DENIED = "it says what the answer is not"


def _code_after(amount: re.Match[str]) -> str:
    """Write `EUR 5` as `5 EUR`. Letters that are not a currency stay before the number."""
    return f"{amount[2]} {amount[1]}" if amount[1].casefold() in UNITS else amount[0]


def _prepared(text: str) -> str:
    """Remove formatting, and mark the parts that LaTeX sets as text instead of a formula."""
    text = text.strip().lstrip("# ")
    while (box := _BOXED.match(text)) or (box := _BOXED.match(text.strip("$ "))):
        text = box[1].strip()
    text = re.sub(r"(?<![\w*)])(\*{1,3}|_{2,3}|`+)(?=\S)([^*_`]+)(?<=\S)\1(?![\w*(])", r"\2", text)
    text = text.replace(r"\$", "\x04")
    dollars = text.count("$")
    if dollars % 2 or re.fullmatch(r"[^$]*(?:\$\s?\.?[0-9][0-9.,]*[^$0-9]*){2,}", text):
        text = re.sub(r"\$(?=\s?[-+]?[0-9.])|(?<=[0-9])\s?\$", "\x04", text)
    text = text.replace("$", " ")
    text = re.sub(r"(?<!\\)\\[()\[\]]", " ", text)
    for _ in range(3):
        text = _SETTING.sub(lambda m: _UNIT_TEXT.format(m[1]), text)
    text = _BRACED_SIGN.sub(r"\1", plain_notation(_LEADING_DASH.sub(r"\1-", text)))
    text = _CODE_BEFORE.sub(_code_after, text).replace("\\\x04", "\x04")
    text = re.sub(r"\\([lr])angle(?![A-Za-z])", lambda m: ANGLES[m[1]], text)
    text = _TYPED_TIMES.sub(r"\\times ", text)
    text = re.sub(r"^\x02([^\x02\x03]*)\x03$", r"\1", text.strip())
    return text.strip().rstrip(".,;").strip()


def _read(text: str) -> Answer:
    text = without_denied_values(text).strip()
    if not text:
        raise Unreadable(text)
    if is_denied(text, is_marked=False):
        raise Unreadable(_DENIED)
    bare = plain_text(text)
    if found := read_whole(bare):
        return found
    introduced = _INTRODUCED.match(bare)
    # The introduction may have only words, no digits and no formula.
    if introduced and not re.search(r"[\d\\]", bare[: introduced.start(introduced.lastgroup or 0)]):
        answer = _read(introduced[introduced.lastgroup or 0].strip(" ."))
        if introduced.lastgroup == "after" and isinstance(answer, Value) and not answer.name:
            return replace(answer, name=_name(bare[: introduced.start("after")].strip(" :")))
        return answer
    text = without_remarks(text).strip()
    while (about := _ABOUT.match(text)) and about.end() < len(text):
        text = text[about.end() :]
    for words, sign in _BOUNDS:
        text = words.sub(lambda _, sign=sign: sign, text)
    return _read_sets(text)


# --- several, sets, intervals ---------------------------------------------------------------------


def _read_sets(text: str) -> Answer:
    text = text.strip()
    bare = plain_text(text)
    if bare in (r"\emptyset", r"\{\}", r"\{ \}"):
        return Several("set", ())
    if re.match(r"^[A-Za-z](?:_\w)?\s*\\in(?![A-Za-z])", bare):
        found = _read_sets(bare.partition(r"\in")[2])
        if isinstance(found, Several) and found.kind == "tuple" and len(found.items) == 2:
            return as_interval(found)
        return found
    parts = split(text, (r"\cup",))
    if len(parts) > 1:
        return Several("list", tuple(_read_sets(part) for part in parts))
    text, is_grouped = without_group_commas(text)
    parts, signs = split_with_signs(
        text, (",", ";", " and ", " or ", r"\text{and}", r"\text{or}", r"\lor", r"\vee")
    )
    if len(parts) > 1:
        if not all(map(plain_text, parts)):
            raise Unreadable(text)
        return Several("list", tuple(_read_sets(part) for part in parts), joined(parts, signs))
    answer = _read_relation(text)
    if is_grouped and isinstance(answer, Value):
        return replace(answer, is_grouped=bool(GROUPED.fullmatch(plain_text(text))) or is_grouped)
    return answer


def _read_relation(text: str) -> Answer:
    parts, signs = split_with_signs(text, tuple(SIGNS))
    signs = [SIGNS[sign] for sign in signs]
    if not signs:
        return _read_brackets(text)
    if set(signs) <= {"="}:
        return _read_equality(parts)
    if signs == [r"\ne"]:
        left, right = (read_value(part) for part in parts)
        return Equation(r"\ne", left.expression - right.expression)
    if "=" in signs or r"\ne" in signs or len(parts) > 3:
        raise Unreadable(text)
    return _read_inequality(parts, signs)


def _read_equality(parts: list[str]) -> Answer:
    if parts[0] == "":
        return _read_brackets(parts[1]) if len(parts) == 2 else _read_equality(parts[1:])
    names = [part for part in parts if _NAME.match(plain_text(part)) and not _constant(part)]
    others = [part for part in parts if part not in names]
    are_letters = not others and all(len(plain_text(part)) == 1 for part in parts)
    if len(parts) == 2 and (not names or are_letters):
        left, right = read_value(parts[0]), read_value(parts[1])
        if left.expression.free_symbols or right.expression.free_symbols:
            return Equation("=", left.expression - right.expression)
    if not others:
        raise Unreadable(str(parts))
    answer = _equal_ones([_read_side(part) for part in others])
    if isinstance(answer, Value) and names:
        return replace(answer, name=_name(plain_text(names[0])))
    return answer


def _read_side(part: str) -> Answer:
    """Read a side of an equation. Here 7-2 is a difference, not a score or date."""
    is_difference = RUN_OF_NUMBERS.match(plain_text(part))
    return read_value(part) if is_difference else _read_brackets(part)


def _name(text: str) -> str:
    """Read the name of a value; "" if it only says that this is the answer."""
    if IDLE_NAMES & set(re.findall(r"[a-z]+", text.casefold())):
        return ""
    return re.sub(r"[\s{}]", "", text)


def _equal_ones(answers: list[Answer]) -> Answer:
    """Return the last of several values joined by `=`. They must be equal."""
    last = answers[-1]
    for answer in answers[:-1]:
        if not (isinstance(answer, Value) and isinstance(last, Value)):
            raise Unreadable(str(answers))
        if same_quantity(answer, last) is not True:
            raise Unreadable("=" if last.expression.free_symbols else _FALSE)
    return last


def _constant(part: str) -> bool:
    return plain_text(part) in (r"\pi", "e", "i", r"\infty", "pi", r"\emptyset")


def _read_inequality(parts: list[str], signs: list[str]) -> Answer:
    is_up = [sign in ("<", r"\le") for sign in signs]
    if len(set(is_up)) > 1:
        raise Unreadable(str(parts))
    if not is_up[0]:
        parts, signs = parts[::-1], [_FLIPPED[sign] for sign in signs[::-1]]
    is_open = [sign == "<" for sign in signs]
    infinity = sympy.oo
    values = [read_value(part) if part else None for part in parts]
    variables = [value is not None and value.expression.is_Symbol for value in values]
    name = next((str(v.expression) for v in values if v is not None and v.expression.is_Symbol), "")
    if len(parts) == 2:
        left, right = values
        if left is None or (variables[0] and _is_constant(right)):
            return Interval(Value(-infinity), right, True, is_open[0], name)
        if right is None or (variables[1] and _is_constant(left)):
            return Interval(left, Value(infinity), is_open[0], True, name)
        return Equation(signs[0], left.expression - right.expression)
    left, middle, right = values
    if not (variables[1] and _is_constant(left) and _is_constant(right)) or middle is None:
        raise Unreadable(str(parts))
    return Interval(left, right, is_open[0], is_open[1], name)


def _is_constant(value: Value | None) -> bool:
    return value is not None and not value.expression.free_symbols


def _read_brackets(text: str) -> Answer:
    text = text.strip()
    bare = plain_text(text)
    if matrix := _MATRIX.match(bare):
        rows = [row for row in re.split(r"\\\\", matrix[2]) if row.strip()]
        if matrix[1] in ("vmatrix", "Vmatrix"):
            raise Unreadable("a determinant")
        return Matrix(tuple(tuple(read_value(cell) for cell in row.split("&")) for row in rows))
    if whole := read_whole(bare):
        if isinstance(whole, Text) and whole.product is not None and len(whole.written) == 1:
            return Value(whole.product)
        return whole
    opening = next((o for o in (r"\{", ANGLES["l"], "(", "[", "{") if text.startswith(o)), "")
    if opening:
        inner, closing = inside(text, opening)
        if closing:
            return _read_bracketed(inner, opening, closing, text)
    return read_value(text)


def _read_bracketed(inner: str, opening: str, closing: str, text: str) -> Answer:
    parts = split(inner, (",", ";"))
    if opening == r"\{":
        if closing != r"\}":
            raise Unreadable(text)
        return Several("set", tuple(_read_relation(part) for part in parts if part))
    if len(parts) == 1:
        if OPENING[opening] != closing:
            raise Unreadable(text)
        if opening in ("(", "{") and inner.strip():
            return _read_sets(inner) if opening == "(" else read_value(inner)
        return read_value(text)
    if opening == "{":
        return Several("set", tuple(_read_relation(part) for part in parts))
    items = tuple(_read_relation(part) for part in parts)
    is_mixed = OPENING[opening] != closing
    is_infinite = any(
        isinstance(item, Value) and item.expression in (sympy.oo, -sympy.oo) for item in items
    )
    if is_mixed or is_infinite:
        if len(items) != 2 or {opening, closing} - set("()[]"):
            raise Unreadable(text)
        return Interval(items[0], items[1], opening != "[", closing != "]")
    return Several("tuple", items, opening + closing)


# --- values and units -----------------------------------------------------------------------------
