r"""What an answer to a mathematical problem says: a value with its unit, several of them, an
interval, an equation, a time, a text, ...; or that it is not understood.

Everything in a text counts: `7 \text{ a.m.}` is not 7, and `1010_3` is not 1010.
"""

import re
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import sympy
from sympy import Rational

from rlad.tasks.answers import IDLE_NAMES
from rlad.tasks.denials import is_denied, without_denied_values
from rlad.tasks.formulas import Unreadable, read_formula
from rlad.tasks.notation import plain_notation
from rlad.tasks.numbers import CHANGING_WORDS, without_remarks
from rlad.tasks.units import MULTIPLIERS, UNITS, known_unit

_MAX_CHARACTERS = 2_000


@dataclass(frozen=True)
class MeasuredIn:
    """A unit: what it measures (the words of an unknown one), how much of that it is, and the value
    of 1 of it where it may be left out (percent, degrees)."""

    kind: tuple[str, ...]
    size: Any = None
    scale: Any = None


@dataclass(frozen=True)
class Value:
    expression: Any
    unit: MeasuredIn | None = None
    name: str = ""
    num_digits: int = 0
    """significant ones of a decimal; 0 for what is no decimal"""
    last_place: Any = 0
    product: Any = None
    """what it is if its unit is no unit but variables"""
    is_grouped: bool = False
    """whether commas are between its thousands"""

    def unnamed(self) -> "Value":
        return replace(self, name="")


@dataclass(frozen=True)
class Text:
    words: str
    written: str
    product: Any = None
    """what it is if its letters are variables"""


@dataclass(frozen=True)
class Several:
    """A `list` without brackets, a `tuple` with some, or a `set`."""

    kind: str
    items: tuple[Any, ...]
    brackets: str = ""


@dataclass(frozen=True)
class Interval:
    left: Any
    right: Any
    is_left_open: bool
    is_right_open: bool
    name: str = ""


@dataclass(frozen=True)
class Equation:
    """`expression` is 0; below 0 for the signs < and \\le; not 0 for \\ne."""

    sign: str
    expression: Any


@dataclass(frozen=True)
class Matrix:
    rows: tuple[tuple[Any, ...], ...]


@dataclass(frozen=True)
class Based:
    """A whole number in a base."""

    digits: str
    base: int

    @property
    def value(self) -> int:
        return int(self.digits, self.base)

    @property
    def as_decimal(self) -> int | None:
        return int(self.digits) if self.digits.isdigit() else None


@dataclass(frozen=True)
class Residue:
    value: int
    modulus: int


@dataclass(frozen=True)
class Time:
    """A time of day with a.m. or p.m."""

    hour: int
    minute: int
    second: int


@dataclass(frozen=True)
class Date:
    year: int | None
    month: int
    day: int


@dataclass(frozen=True)
class Colons:
    """Numbers with colons between them: a ratio, a time or a duration."""

    values: tuple[Fraction, ...]
    may_be_time: bool


@dataclass(frozen=True)
class NotRead:
    """A text that is not understood; or that says what cannot be (`is_false`), 7 = 42, or what the
    answer is not (`is_denied`)."""

    written: str
    is_false: bool = field(default=False, compare=False)
    is_denied: bool = field(default=False, compare=False)


Answer = (
    Value | Text | Several | Interval | Equation | Matrix | Based | Residue | Time | Date | Colons
    | NotRead
)  # fmt: skip

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
_LETTERS_ONLY = re.compile(
    r"^[(\[]?\s*[^\W\d_]+(?:[\s,.;:'\"()&!?-]+[^\W\d_]+)*[\s.,)\]]*$|^[^\W\d_]{4,}[!?'\"]$"
)
_LETTER_FORMULA = re.compile(r"[^\W\d_]\s*-\s*[^\W\d_]|[^\W\d_]\(")
_INEQUALITY = re.compile(r"[<>]|!=|\\(?:[lg]e|ne)(?![A-Za-z])")
_NO_UNITS = CHANGING_WORDS | {"below", "above", "negative", "least", "most"}
_FUNCTION_WORD = re.compile(
    r"^(?:pi|sqrt|infty|infinity|sin|cos|tan|ln|log|exp|inf|oo|e|i)$", re.IGNORECASE
)
_TIME = re.compile(
    r"^([0-9]{1,2})(?:\s?[:.]\s?([0-9]{2}))?(?:\s?:\s?([0-9]{2}))?\s*([ap])\.?\s?m\b\.?$",
    re.IGNORECASE,
)
_COLONS = re.compile(r"^[0-9]+(?:\.[0-9]+)?(?:\s*:\s*[0-9]+(?:\.[0-9]+)?)+$")
_CLOCK = re.compile(r"^[0-9]{1,2}:[0-9]{2}(?::[0-9]{2})?$")
_ISO_DATE = re.compile(r"^([0-9]{4})-([0-9]{1,2})-([0-9]{1,2})$")
_MONTHS = "january february march april may june july august september october november december"
_MONTH = rf"({'|'.join(f'{month[:3]}(?:{month[3:]})?' for month in _MONTHS.split())})\.?"
_WRITTEN_DATE = re.compile(
    rf"^(?:{_MONTH}\s+([0-9]{{1,2}})(?:st|nd|rd|th)?(?:\s*,?\s+([0-9]{{4}}))?"
    rf"|([0-9]{{1,2}})(?:st|nd|rd|th)?\s+(?:of\s+)?{_MONTH}(?:\s*,?\s+([0-9]{{4}}))?)$",
    re.IGNORECASE,
)
_RUN_OF_NUMBERS = re.compile(
    r"^[0-9]+(?:\s*[-\N{EN DASH}]\s*[0-9]+)+$|^[0-9]+(?:\s*/\s*[0-9]+){2,}$"
)
_BASED = re.compile(r"^\(?\s*([0-9A-Fa-f ]+?)\s*\)?\s*_\s*\{?\s*\(?([0-9]{1,2})\)?\s*\}?$")
_BASE_WORDS = re.compile(r"^([0-9A-Fa-f]+)\s*(?:\(\s*)?(?:in )?base\s*\{?([0-9]{1,2})\}?\s*\)?$")
_PREFIXED = re.compile(r"^0([xXbBoO])([0-9A-Fa-f]+)$")
_RESIDUE = re.compile(
    r"^(?:[A-Za-z]\s*\\equiv\s*)?(-?[0-9]+)\s*\(?\s*(?:\\p?mod|\\bmod|\\pod|mod(?:ulo)?)"
    r"\s*\{?\s*\(?([0-9]+)\)?\s*\}?\s*\)?$"
)
_MATRIX = re.compile(
    r"^\\begin\{([pbBvV]?matrix|array)\}(?:\{[lcr|]*\})?(.*)\\end\{\1\}$", re.DOTALL
)
_NAME = re.compile(
    r"^(?:\\?[A-Za-z]+'?(?:_(?:\w|\{[^{}]*\}))?'?(?:\s*\([A-Za-z](?:\s*,\s*[A-Za-z])*\))?"
    r"|(?:[PEfgh]|Pr|Var|Cov|gcd|lcm|max|min)\s*[(\[][^()\[\]]*[)\]]"
    r"|\(\s*[A-Za-z](?:_\w)?(?:\s*,\s*[A-Za-z](?:_\w)?)+\s*\)"
    r"|\|?(?:\\(?:angle|triangle|overline|vec)\s*)?\{?[A-Z]{1,4}\}?\|?|[A-Za-z][A-Za-z ]*)$"
)
_GROUPED = re.compile(
    r"(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9]|,[0-9])"
    r"|(?<![0-9.,])[0-9]{1,2}(?:,[0-9]{2})+,[0-9]{3}(?![0-9]|,[0-9])"
)
_DECIMAL = re.compile(
    r"^[-+]?\s*([0-9]*\.[0-9]+)(?:\s*(?:\\times|\\cdot|[x*])\s*10\s*\^\s*\{?\s*([-+]?[0-9]+)\s*\}?"
    r"|[eE]([-+]?[0-9]+))?$"
)
_SCIENTIFIC = re.compile(
    r"(?<![A-Za-z\\])([0-9]+\.?[0-9]*|\.[0-9]+)[eE]([-+]?[0-9]+)(?![A-Za-z0-9.])"
)
_TYPED_TIMES = re.compile(r"(?<=[0-9])\s*[xX]\s*(?=10\s*\^)|(?<=[0-9])\s+[xX]\s+(?=[0-9])")
_MONEY = re.compile(
    r"^(?P<sign>[-+]?)\s*(?:US)?\s*(?P<currency>[\x04\N{EURO SIGN}\N{POUND SIGN}\N{YEN SIGN}"
    r"\N{INDIAN RUPEE SIGN}])\s*(?P<rest>.+)$"
)
_CURRENCIES = {
    "\x04": "dollars",
    "\N{EURO SIGN}": "euros",
    "\N{POUND SIGN}": "gbp",
    "\N{YEN SIGN}": "yen",
    "\N{INDIAN RUPEE SIGN}": "rupees",
}
_TRAILING_UNIT = re.compile(
    r"^(?P<value>.*?(?:[0-9)}\]!|.]|\\pi))(?P<space>\s*)(?P<unit>[A-Za-z\N{EURO SIGN}\N{POUND SIGN}"
    r"\N{CENT SIGN}\x04][A-Za-z.,' /^{}0-9-]*?)$",
    re.DOTALL,
)
_SET_TEXT = re.compile(
    r"^(?P<value>.*?)\s*\x02(?P<unit>[^\x02\x03]*)\x03\s*(?P<power>\^\s*\{?\s*-?[0-9]\s*\}?)?"
    r"(?P<more>(?:\s*(?:/|\\cdot)?\s*\x02[^\x02\x03]*\x03\s*(?:\^\s*\{?\s*-?[0-9]\s*\}?)?)*)$",
    re.DOTALL,
)
_COMPOUND = re.compile(r"^(?:[0-9]+(?:\.[0-9]+)?\s*[A-Za-z]+[\s,]*(?:and\s+)?){2,}$")
_SET_IN_FORMULA = re.compile(r"\x02([^\x02\x03]*)\x03")
_IN_FORMULA = re.compile(
    r"^(?:[A-Zei]|\x04|[0-9.,]*|%|pi|sqrt|sin|cos|tan|ln|log|exp|arcsin|arccos|arctan)$"
)
_IDLE_END = re.compile(r"(?:\s+(?:each|in total|total|altogether|in all|left|more|old))+$")
_PERCENT = re.compile(r"^(.*?)\s*(?:\\%|%)$", re.DOTALL)
_DEGREES = re.compile(r"^(.*?)\s*\^\s*\\circ\s*([CF]?)$", re.DOTALL)
_ORDINAL = re.compile(r"^([0-9]+)\s*(?:\^\s*\{?\s*)?(?:st|nd|rd|th)\s*\}?$")
_SIGNS = {
    **{sign: sign for sign in (r"\le", r"\ge", r"\ne")},
    **{"<=": r"\le", ">=": r"\ge", "!=": r"\ne", "==": "="},
    **{sign: sign for sign in ("<", ">", "=")},
}
"""What is written for a relation, the longest first"""
_ANGLES = {
    "l": "\N{MATHEMATICAL LEFT ANGLE BRACKET}",
    "r": "\N{MATHEMATICAL RIGHT ANGLE BRACKET}",
}
_OPENING = {"(": ")", "[": "]", "{": "}", r"\{": r"\}", _ANGLES["l"]: _ANGLES["r"]}
_LEFT = "([{" + _ANGLES["l"]
_RIGHT = ")]}" + _ANGLES["r"]
_FLIPPED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}


def read_answer(text: str) -> Answer:
    """Read an answer, or what "... is" or a colon introduces in one."""
    if len(text) > _MAX_CHARACTERS:
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


def _prepared(text: str) -> str:
    """Take away what only sets the text, with marks where LaTeX says that something is no
    formula."""
    text = text.strip().lstrip("# ")
    while (box := _BOXED.match(text)) or (box := _BOXED.match(text.strip("$ "))):
        text = box[1].strip()
    text = re.sub(r"(?<![\w*)])(\*{1,3}|_{2,3}|`+)(?=\S)([^*_`]+)(?<=\S)\1(?![\w*(])", r"\2", text)
    text = text.replace(r"\$", "\x04")
    dollars = text.count("$")
    if dollars % 2 or re.fullmatch(r"[^$]*\$\s?[0-9.,]+[^$0-9]*(?:\$\s?[0-9.,]+[^$0-9]*)+", text):
        text = re.sub(r"\$(?=\s?[-+]?[0-9.])|(?<=[0-9])\s?\$", "\x04", text)
    text = text.replace("$", " ")
    text = re.sub(r"\\[()\[\]](?![A-Za-z])", " ", text)
    for _ in range(3):
        text = _SETTING.sub(lambda m: _UNIT_TEXT.format(m[1]), text)
    text = plain_notation(text).replace("\\\x04", "\x04")
    text = re.sub(r"\\([lr])angle(?![A-Za-z])", lambda m: _ANGLES[m[1]], text)
    text = _TYPED_TIMES.sub(r"\\times ", text)
    text = re.sub(r"^\x02([^\x02\x03]*)\x03$", r"\1", text.strip())
    return text.strip().rstrip(".,;").strip() if not text.rstrip().endswith("...") else text


def _read(text: str) -> Answer:
    text = without_denied_values(text).strip()
    if not text:
        raise Unreadable(text)
    if is_denied(text, is_marked=False):
        raise Unreadable(_DENIED)
    bare = _bare(text)
    if found := _read_whole(bare):
        return found
    introduced = _INTRODUCED.match(bare)
    # Only where what introduces has words, no digits and no formula.
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


def _bare(text: str) -> str:
    return " ".join(text.replace("\x02", " ").replace("\x03", " ").split()).rstrip(".,;")


def _read_whole(bare: str) -> Answer | None:
    """Read what is one thing as a whole: a text, a time, a date, a number in a base, ..."""
    if _LETTERS_ONLY.match(bare) and not (_is_formula_word(bare) or _is_letter_formula(bare)):
        words = bare.casefold().strip(" .!?\"'")
        inner = re.sub(r"^\(\s*(\w+)\s*\)$", r"\1", words)
        letters = bare.replace(" ", "").strip("().!?\"'")
        written = bare.strip(" ().!?\"'")
        return Text(inner, written, _product(letters) if len(letters) <= 3 else None)
    if calendar := _read_calendar(bare):
        return calendar
    if _RUN_OF_NUMBERS.match(bare):
        raise Unreadable(bare)
    if (based := _BASED.match(bare) or _BASE_WORDS.match(bare)) and _has_base(based[1], based[2]):
        return Based(based[1].replace(" ", "").upper(), int(based[2]))
    if prefixed := _PREFIXED.match(bare):
        base = {"x": 16, "b": 2, "o": 8}[prefixed[1].lower()]
        return Based(prefixed[2].upper(), base)
    if residue := _RESIDUE.match(bare):
        return Residue(int(residue[1]) % (int(residue[2]) or 1), int(residue[2]))
    return None


def _read_calendar(bare: str) -> Answer | None:
    """Read a time, a date, or numbers with colons between them."""
    if time := _TIME.match(bare):
        hour, minute, second = (int(part or 0) for part in time.groups()[:3])
        if not (1 <= hour <= 12 and minute < 60 and second < 60):
            raise Unreadable(bare)
        return Time(hour % 12 + (12 if time[4] in "pP" else 0), minute, second)
    if _COLONS.match(bare):
        values = tuple(Fraction(part.strip()) for part in bare.split(":"))
        return Colons(values, bool(_CLOCK.match(bare)))
    if date := _ISO_DATE.match(bare):
        return Date(int(date[1]), int(date[2]), int(date[3]))
    if date := _WRITTEN_DATE.match(bare):
        month, day = (date[1], date[2]) if date[1] else (date[5], date[4])
        names = [name[:3] for name in _MONTHS.split()]
        year = date[3] or date[6]
        return Date(int(year) if year else None, names.index(month[:3].lower()) + 1, int(day))
    return None


def _has_base(digits: str, base: str) -> bool:
    # A_{1} is a variable.
    is_number = digits[0].isdigit() or (len(digits) > 1 and int(base) > 10)
    if is_number and not 2 <= int(base) <= 36:
        raise Unreadable(digits)
    return is_number


def _is_formula_word(bare: str) -> bool:
    return all(_FUNCTION_WORD.match(word) for word in re.findall(r"[^\W\d_]+", bare))


def _is_letter_formula(bare: str) -> bool:
    """Say whether letters are variables: a - b, n(N-n)."""
    are_short = all(len(word) <= 2 for word in re.findall(r"[^\W\d_]+", bare))
    is_formula = are_short and _LETTER_FORMULA.search(bare) is not None
    return is_formula and _product(bare) is not None


def _product(letters: str) -> Any:
    try:
        return read_formula(letters)
    except Unreadable:
        return None


# --- several, sets, intervals ---------------------------------------------------------------------


def _read_sets(text: str) -> Answer:
    text = text.strip()
    bare = _bare(text)
    if bare in (r"\emptyset", r"\{\}", r"\{ \}"):
        return Several("set", ())
    if re.match(r"^[A-Za-z](?:_\w)?\s*\\in(?![A-Za-z])", bare):
        found = _read_sets(bare.partition(r"\in")[2])
        if isinstance(found, Several) and found.kind == "tuple" and len(found.items) == 2:
            return as_interval(found)
        return found
    parts = _split(text, (r"\cup",))
    if len(parts) > 1:
        return Several("list", tuple(_read_sets(part) for part in parts))
    text, is_grouped = _without_group_commas(text)
    parts, signs = _split_with_signs(
        text, (",", ";", " and ", " or ", r"\text{and}", r"\text{or}", r"\lor", r"\vee")
    )
    if len(parts) > 1:
        if not all(map(_bare, parts)):
            raise Unreadable(text)
        return Several("list", tuple(_read_sets(part) for part in parts), _joined(parts, signs))
    answer = _read_relation(text)
    if is_grouped and isinstance(answer, Value):
        return replace(answer, is_grouped=bool(_GROUPED.fullmatch(_bare(text))) or is_grouped)
    return answer


def _joined(parts: list[str], signs: list[str]) -> str:
    """Say how inequalities are joined, since x < 5 and x > 7 is not x < 5 or x > 7; "" for other
    items, and where one of them is enough."""
    if not any(map(_INEQUALITY.search, parts)):
        return ""
    words = {sign.strip().removeprefix(r"\text").strip("{}") for sign in signs}
    if words <= {"or", r"\lor", r"\vee"}:
        return ""
    # x is neither 1 nor 2 whether a comma or a word is between.
    is_unequal = all(r"\ne" in part or "!=" in part for part in parts)
    return "and" if is_unequal or "and" in words else ","


def _without_group_commas(text: str) -> tuple[str, bool]:
    """Take commas out of thousands, except in brackets, where they are between coordinates."""
    depth = 0
    pieces = []
    last = 0
    found = False
    depths = []
    for character in text:
        depth += (character in _LEFT) - (character in _RIGHT)
        depths.append(depth)
    for match in _GROUPED.finditer(text):
        if depths[match.start()] <= 0 and not re.match(r"\s*[,;]", text[match.end() :]):
            pieces.append(text[last : match.start()] + match[0].replace(",", ""))
            last = match.end()
            found = True
    return "".join(pieces) + text[last:], found


def _split(text: str, separators: tuple[str, ...]) -> list[str]:
    """Split at separators that are in no brackets."""
    return _split_with_signs(text, separators)[0]


def _split_with_signs(text: str, separators: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Split at separators that are in no brackets, of which the first that fits counts; list them,
    too."""
    # Marks of set text are one character each, so places are the same.
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


def _read_relation(text: str) -> Answer:
    parts, signs = _split_with_signs(text, tuple(_SIGNS))
    signs = [_SIGNS[sign] for sign in signs]
    if not signs:
        return _read_brackets(text)
    if set(signs) <= {"="}:
        return _read_equality(parts)
    if signs == [r"\ne"]:
        left, right = (_value(part) for part in parts)
        return Equation(r"\ne", left.expression - right.expression)
    if "=" in signs or r"\ne" in signs or len(parts) > 3:
        raise Unreadable(text)
    return _read_inequality(parts, signs)


def _read_equality(parts: list[str]) -> Answer:
    if parts[0] == "":
        return _read_brackets(parts[1]) if len(parts) == 2 else _read_equality(parts[1:])
    names = [part for part in parts if _NAME.match(_bare(part)) and not _constant(part)]
    others = [part for part in parts if part not in names]
    are_letters = not others and all(len(_bare(part)) == 1 for part in parts)
    if len(parts) == 2 and (not names or are_letters):
        left, right = _value(parts[0]), _value(parts[1])
        if left.expression.free_symbols or right.expression.free_symbols:
            return Equation("=", left.expression - right.expression)
    if not others:
        raise Unreadable(str(parts))
    answer = _equal_ones([_read_brackets(part) for part in others])
    if isinstance(answer, Value) and names:
        return replace(answer, name=_name(_bare(names[0])))
    return answer


def _name(text: str) -> str:
    """Read what an answer is the value of; "" where the name only says that it is the answer."""
    if IDLE_NAMES & set(re.findall(r"[a-z]+", text.casefold())):
        return ""
    return re.sub(r"[\s{}]", "", text)


def _equal_ones(answers: list[Answer]) -> Answer:
    """Return the last of values that are said to be equal, which they must be."""
    from rlad.tasks.mathematics import compare  # which reads answers with this module

    last = answers[-1]
    for answer in answers[:-1]:
        if not (isinstance(answer, Value) and isinstance(last, Value)):
            raise Unreadable(str(answers))
        if compare(answer, last) is not True:
            raise Unreadable("=" if last.expression.free_symbols else _FALSE)
    return last


def _constant(part: str) -> bool:
    return _bare(part) in (r"\pi", "e", "i", r"\infty", "pi", r"\emptyset")


def _read_inequality(parts: list[str], signs: list[str]) -> Answer:
    is_up = [sign in ("<", r"\le") for sign in signs]
    if len(set(is_up)) > 1:
        raise Unreadable(str(parts))
    if not is_up[0]:
        parts, signs = parts[::-1], [_FLIPPED[sign] for sign in signs[::-1]]
    is_open = [sign == "<" for sign in signs]
    infinity = sympy.oo
    values = [_value(part) if part else None for part in parts]
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
    bare = _bare(text)
    if matrix := _MATRIX.match(bare):
        rows = [row for row in re.split(r"\\\\", matrix[2]) if row.strip()]
        if matrix[1] in ("vmatrix", "Vmatrix"):
            raise Unreadable("a determinant")
        return Matrix(tuple(tuple(_value(cell) for cell in row.split("&")) for row in rows))
    if whole := _read_whole(bare):
        if isinstance(whole, Text) and whole.product is not None and len(whole.written) == 1:
            return Value(whole.product)
        return whole
    opening = next((o for o in (r"\{", _ANGLES["l"], "(", "[", "{") if text.startswith(o)), "")
    if opening:
        inner, closing = _inside(text, opening)
        if closing:
            return _read_bracketed(inner, opening, closing, text)
    return _value(text)


def _inside(text: str, opening: str) -> tuple[str, str]:
    """What brackets around the whole text hold, and the closing one; "" where they end before."""
    depth = 0
    for at, character in enumerate(text):
        depth += (character in _LEFT) - (character in _RIGHT)
        if depth == 0 and at >= len(opening) - 1:
            if at != len(text) - 1:
                return "", ""
            closing = r"\}" if text.endswith(r"\}") else character
            return text[len(opening) : len(text) - len(closing)], closing
    return "", ""


def _read_bracketed(inner: str, opening: str, closing: str, text: str) -> Answer:
    parts = _split(inner, (",", ";"))
    if opening == r"\{":
        if closing != r"\}":
            raise Unreadable(text)
        return Several("set", tuple(_read_relation(part) for part in parts if part))
    if len(parts) == 1:
        if _OPENING[opening] != closing:
            raise Unreadable(text)
        if opening in ("(", "{") and inner.strip():
            return _read_sets(inner) if opening == "(" else _value(inner)
        return _value(text)
    if opening == "{":
        return Several("set", tuple(_read_relation(part) for part in parts))
    items = tuple(_read_relation(part) for part in parts)
    is_mixed = _OPENING[opening] != closing
    is_infinite = any(
        isinstance(item, Value) and item.expression in (sympy.oo, -sympy.oo) for item in items
    )
    if is_mixed or is_infinite:
        if len(items) != 2 or {opening, closing} - set("()[]"):
            raise Unreadable(text)
        return Interval(items[0], items[1], opening != "[", closing != "]")
    return Several("tuple", items, opening + closing)


def as_interval(pair: Several) -> Interval:
    left, right = pair.items
    return Interval(left, right, pair.brackets[0] != "[", pair.brackets[1] != "]")


# --- values and units -----------------------------------------------------------------------------


def _value(text: str) -> Any:
    """Read a formula with its unit; \\pm makes two values of it."""
    text = text.strip()
    if ordinal := _ORDINAL.match(_bare(text)):
        return _number(ordinal[1])
    if len(re.findall(r"\\[pm][pm](?![A-Za-z])", text)) == 1:
        both = [re.sub(r"\\(?:pm|mp)(?![A-Za-z])", sign, text) for sign in "+-"]
        return Several("list", tuple(_value(one) for one in both))
    return _set_unit(text) or _signed_unit(_bare(_SET_IN_FORMULA.sub(_formula_part, text)))


def _set_unit(text: str) -> Value | None:
    """Read a unit that LaTeX sets as text."""
    found = _SET_TEXT.match(text)
    if not found or not found["value"].strip():
        return None
    unit = _bare(f"{found['unit'].strip()}{found['power'] or ''} {found['more']}").strip()
    is_in_formula = _IN_FORMULA.match(unit) and not re.match(r"[A-Z]$", unit)
    if not unit or is_in_formula or re.search(r"(?<![\^{-])[0-9]", unit):
        return None
    return _with_unit(found["value"], unit)


def _signed_unit(bare: str) -> Value:
    """Read a unit that has a sign or is typed, or none."""
    if _COMPOUND.match(bare):
        return _compound(bare)
    if money := _MONEY.match(bare):
        name = _CURRENCIES[money["currency"]]
        amount, per, other = re.split(r"(\s*/\s*(?=[A-Za-z])|\s+per\s+|$)", money["rest"])[:3]
        value = _value(money["sign"] + _IDLE_END.sub("", amount))
        unit = _measured_in(f"{name} per {other}" if per else name)
        if value.unit not in (None, unit):
            raise Unreadable(bare)
        return replace(value, unit=unit)
    if percent := _PERCENT.match(bare):
        return _with_unit(percent[1], "%")
    if degrees := _DEGREES.match(bare):
        names = {"C": "celsius", "F": "fahrenheit", "": "degrees"}
        if r"\circ" not in degrees[1] and not re.search(r"\\(?:sin|cos|tan)", degrees[1]):
            return _with_unit(degrees[1], names[degrees[2]])
    if trailing := _TRAILING_UNIT.match(bare):
        unit = trailing["unit"].strip()
        found = _typed_unit(trailing["value"], unit, bool(trailing["space"]))
        if found is not None:
            return found
    return _number(bare)


def _formula_part(match: re.Match[str]) -> str:
    """Take set text into a formula: the e of \\mathrm{e}, but no words."""
    inner = match[1].strip()
    if not _IN_FORMULA.match(inner):
        raise Unreadable(inner)
    return f" {inner} "


def _compound(text: str) -> Value:
    """Add up 1 hour 30 minutes."""
    parts = re.findall(r"([0-9.]+)\s*([A-Za-z]+)", text)
    units = [known_unit("inch" if name == "in" else name) for _, name in parts]
    kinds = {unit[0] for unit in units if unit}
    if None in units or len(kinds) != 1:
        raise Unreadable(text)
    sizes = [unit[1] for unit in units if unit]
    if sizes != sorted(set(sizes), reverse=True):
        raise Unreadable(text)
    total = sum(Fraction(number) * size for (number, _), size in zip(parts, sizes, strict=True))
    kind = MeasuredIn((f"{kinds.pop()}^1",), Rational(1))
    return Value(Rational(total.numerator, total.denominator), kind)


def _typed_unit(value: str, unit: str, is_apart: bool) -> Value | None:
    """Read words after a number as its unit; None where they are variables."""
    first = re.split(r"[\s/^.,-]", unit, maxsplit=1)[0]
    if re.match(r"[eE][-+]?[0-9]", unit):
        return None
    is_known = known_unit(unit) is not None or known_unit(first) is not None
    is_word = len(first) > 3 or (is_apart and len(first) == 3) or len(unit.split()) > 1
    if first.lower() in ("sin", "cos", "tan", "log", "ln", "exp", "sqrt", "pi", "mod", "base"):
        return None
    is_power = is_known and unit.lower().split()[-1] in ("squared", "cubed")
    if _NO_UNITS & set(unit.lower().split()) and not is_power:
        raise Unreadable(unit)
    if first.lower() in ("a", "p", "am", "pm", "and", "or", "r", "to", "plus", "minus", "times"):
        raise Unreadable(unit)
    if not (is_known or is_word or first.lower() in MULTIPLIERS):
        return None
    if re.search(r"(?<![\^{-])[0-9]", unit):
        raise Unreadable(unit)
    if len(unit) == 1:
        # 5 m is five metres, or a product.
        found = _with_unit(value, unit)
        return replace(found, product=_product_of(f"{value} {unit}"))
    if not is_known and first.lower() not in MULTIPLIERS and not is_apart:
        raise Unreadable(unit)
    return _with_unit(value, unit)


def _product_of(text: str) -> Any:
    try:
        return read_formula(text)
    except Unreadable:
        return None


def _with_unit(value: str, unit: str) -> Value:
    words = unit.split()
    factor = Rational(1)
    while words and words[0].lower().rstrip("s") in MULTIPLIERS:
        factor *= MULTIPLIERS[words.pop(0).lower().rstrip("s")]
    money = _MONEY.match(_bare(value))
    number = _value(value) if money or "\x02" in value else _number(_bare(value))
    if not isinstance(number, Value):
        raise Unreadable(value)
    if factor != 1:
        number = replace(number, expression=number.expression * factor, num_digits=0)
    rest = " ".join(words)
    if number.unit is not None and rest:
        return number if known_unit(rest) == UNITS["$"] else _refuse(value)
    return replace(number, unit=number.unit or (_measured_in(rest) if rest else None))


def _refuse(text: str) -> Any:
    raise Unreadable(text)


def _measured_in(unit: str) -> MeasuredIn:
    """Read the name of a unit: `km/h`, `m^2`, `square metres`, `eggs`."""
    text = _IDLE_END.sub("", unit.strip(" .")).replace("\x04", "$").replace(r"\cdot", " ")
    parts = re.split(r"\s*/\s*|\s+per\s+", text)
    kinds = []
    size = Fraction(1)
    for place, part in enumerate(parts):
        match = re.match(
            r"^(?P<power>(?:sq|square|cu|cubic)\.?\s+)?(?P<name>[^\^]+?)"
            r"(?:\s*\^\s*\{?\s*(?P<exponent>-?[0-9])\s*\}?)?(?P<squared>\s+squared|\s+cubed)?$",
            part,
            re.IGNORECASE,
        )
        known = known_unit(match["name"]) if match else None
        if match is None or known is None:
            return MeasuredIn(_unknown(text))
        exponent = int(match["exponent"] or 1)
        if match["power"] or match["squared"]:
            exponent = 2 if "q" in (match["power"] or match["squared"]).lower() else 3
        exponent = -exponent if place else exponent
        kinds.append(f"{known[0]}^{exponent}")
        size *= known[1] ** exponent
    scale = None
    if kinds == ["percent^1"]:
        scale = Rational(1, 100)
    if kinds == ["degrees^1"]:
        scale = sympy.pi / 180
    kind = tuple(sorted(kinds))
    # Speeds have names of their own, mph.
    if kind == ("length^1", "time^-1"):
        kind = ("speed^1",)
    return MeasuredIn(kind, Rational(size.numerator, size.denominator), scale)


def _unknown(text: str) -> tuple[str, ...]:
    words = re.findall(r"[^\W\d_]+|\^\{?-?[0-9]", text.casefold())
    idle = {"of", "the", "in", "total", "a", "each", "all", "more", "altogether", "left"}
    kept = [_singular(word) for word in words if word not in idle]
    return tuple(kept) or (text,)


def _singular(word: str) -> str:
    irregular = {"people": "person", "children": "child", "men": "man", "women": "woman"}
    if word in irregular:
        return irregular[word]
    if word.endswith("ies"):
        return word[:-3] + "y"
    return word[:-1] if word.endswith("s") and not word.endswith("ss") else word


def _number(text: str) -> Value:
    """Read a formula without unit."""
    text = text.strip()
    has_commas = bool(_GROUPED.fullmatch(text.lstrip("-+ ")))
    if has_commas:
        text = text.replace(",", "")
    spelt = _SCIENTIFIC.sub(r"(\1*10^{\2})", text)
    spelt = re.sub(r"(?<![A-Za-z\\])(?:infinity|inf|oo)(?![A-Za-z])", r"\\infty ", spelt)
    expression = read_formula(spelt)
    decimal = _DECIMAL.match(text)
    if decimal is None:
        return Value(expression)
    places = len(decimal[1].partition(".")[2])
    power = int(decimal[2] or decimal[3] or 0)
    digits = decimal[1].replace(".", "").lstrip("0")
    return Value(expression, num_digits=len(digits), last_place=Rational(10) ** (power - places))
