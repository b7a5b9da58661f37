"""The number of a final answer, read as a whole or not at all: a pure function on text.

A fragment is never read as the number: neither the last piece of `9:30`, `(3, 4)` or `3\\sqrt{2}`,
nor a denied number (`$20, not $30`), nor one of several.
"""

import re
from dataclasses import dataclass, field
from fractions import Fraction

from rlad.tasks.denials import is_denied, is_struck, is_taken_back, without_denied_values
from rlad.tasks.notation import plain_notation, without_wrapping, words
from rlad.tasks.surroundings import (
    CHANGING_WORDS,
    begins_before,
    ends_behind,
    is_another_remark,
    without_too,
    words_of,
)
from rlad.tasks.units import MULTIPLIERS, UNITS, Unit, known_unit
from rlad.tasks.written_numbers import NUMBER, SPELT, evaluate_arithmetic, in_digits, value_of

_MAX_LINE_CHARACTERS = 2_000
_MAX_NUMBERS = 50


@dataclass(frozen=True, slots=True)
class Amount:
    """One number with its unit, if known, or otherwise the word after it, if any."""

    value: Fraction
    unit: Unit | None = None
    counted: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Figures:
    """Several numbers and the signs between them: a time, a date, a point or a list."""

    shape: str
    values: tuple[Fraction, ...]


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A text with digits that is not a plain number."""


Reading = Amount | Figures | Unreadable | None

_EQUALS = re.compile(r"(?<![<>!=:\\])=+(?![<>])")
_ABOUT = re.compile(r"\\(?:approx|simeq|cong|sim)(?![A-Za-z])|~=|=~")
_ARROW = re.compile(
    r"[-=]+>|[\N{RIGHTWARDS ARROW}\N{RIGHTWARDS DOUBLE ARROW}\N{THEREFORE}]"
    r"|\\(?:to|(?:long)?[rR]ightarrow|Longrightarrow|implies|therefore)(?![A-Za-z])"
)
_EMPHASIS = re.compile(r"(?<![\w*)])(\*{1,3}|_{1,3}|`+)(?=\S)([^*_`]+)(?<=\S)\1(?![\w*(])")
_PER = re.compile(r"(?<=[0-9])\s?/\s?(?=[A-Za-z]{3})")
_POWER_OF_UNIT = re.compile(r"(?<=[0-9 ])([A-Za-z]{1,3})\s?\^\s?\{?\s?([23])\s?\}?(?![\w^])")
_SLASHES = re.compile(r"[0-9]+(?:\s?/\s?[0-9]+){2,}")
ELLIPSIS = re.compile(r"[0-9]?\.[0-9]+\s*(?:\.{2,}|\N{HORIZONTAL ELLIPSIS}|\\[lc]?dots)")
_UNEQUAL = re.compile(r"[^,;()]*(?:\\ne(?![A-Za-z])|!=)[^,;()]*+")
_REMARK = re.compile(r"(?<=[^\s(])\s\((?!\s*mod)(?=\s*[A-Za-z]{2})([^()]*)\)")
_CURRENCY = r"(?:\\?\$|[\N{EURO SIGN}\N{POUND SIGN}\N{YEN SIGN}\N{INDIAN RUPEE SIGN}\N{CENT SIGN}])"
_MONEY = re.compile(
    rf"(?:(?<![\w)])(?P<minus>[-+])\s?)?(?<![A-Za-z])(?P<country>[A-Z]{{1,3}})?(?P<sign>{_CURRENCY})"
    r"\s?(?=[-+]?[0-9.])"
)
_MONEY_AFTER = re.compile(r"(?<=[0-9])\s?([\N{EURO SIGN}\N{POUND SIGN}\N{YEN SIGN}\N{CENT SIGN}])")
_CURRENCIES = {
    "$": "dollars",
    "\N{EURO SIGN}": "euros",
    "\N{POUND SIGN}": "gbp",
    "\N{YEN SIGN}": "yen",
    "\N{INDIAN RUPEE SIGN}": "rupees",
    "\N{CENT SIGN}": "cents",
}
_CODE = re.compile(r"\b(USD|EUR|GBP|JPY|INR)\s?(?=[-+]?[0-9.])")
_DOLLARS = re.compile(r"\\\$|\$")
_DEGREE = re.compile(r"\^\s*\\circ(?![A-Za-z])")
_LEADING_DASH = re.compile(
    r"(?:(?<![\w)\]}.%\s])|(?<=[A-Za-z=:]\s)|(?<=^\s))"
    "[\N{EN DASH}\N{FIGURE DASH}\N{HEAVY MINUS SIGN}\N{MODIFIER LETTER MINUS SIGN}"
    "\N{SUPERSCRIPT MINUS}]"
    r"(?=\\?\$?\s?\.?[0-9])"
)
# Words that change an answer even in brackets after it.
_TELLING_WORDS = frozenset(
    words("or and to negative minus not wrong incorrect false except bc ad bce ce remainder below")
)
_NEGATING_WORDS = ("minus", "negative")
_ALTERNATIVE = re.compile(r"\bout of\b|\bor\b|\bto\b|\band\b|\bbetween\b", re.IGNORECASE)
_UNIT_AFTER = re.compile(
    r"\s*(?:(?P<power>square|sq|cubic|cu)\.?\s+)?(?P<name>(?!per\b)[^\W\d_/]+(?:/[^\W\d_]+)?)?\.?"
    r"(?:\s*\b(?P<rate>per|an?|each)\s+(?P<per>[^\W\d_]+))?"
)
_BOUND_BEFORE = re.compile(
    r"\b(?:at (?:least|most)|(?:less|more|fewer|greater|larger|smaller|higher|lower) than|up to"
    r"|under|above|below|beyond|(?:minimum|maximum) of)\s+(?:\x02\w+\s*)?[(*_$\s]*$",
    re.IGNORECASE,
)
_BOUND_AFTER = re.compile(
    r"(?:\s+[^\W\d_]+)?\s+(?:(?:or|and) (?:more|less|fewer|greater|above|below|over|under|up|higher"
    r"|lower)|at (?:least|most))\b",
    re.IGNORECASE,
)
_MONTH = (
    r"(?:Jan(?:uary)?|Feb(?:ruary)?|Mar(?:ch)?|Apr(?:il)?|May|June?|July?|Aug(?:ust)?"
    r"|Sept?(?:ember)?|Oct(?:ober)?|Nov(?:ember)?|Dec(?:ember)?)\b\.?"
)
_DATE_BEFORE = re.compile(rf"\b(?:{_MONTH}|BC|AD|BCE|CE)\s*$")
_DATE_AFTER = re.compile(
    rf"(?:st|nd|rd|th)?\s+(?:of\s+)?(?:{_MONTH}|BCE?\b|CE\b|AD\b|B\.C\.|A\.D\.)"
)
_NEXT_VALUE = re.compile(
    r"[0-9)}]\s*(?:[,;]|\b(?:or|and)\b|\\(?:lor|vee|land))\s*(?:(?:or|and)\s+)?\\?[A-Za-z]\w{0,9}"
    r"(?:_\{\w+\})?\s*=(?!=)"
)
_ANOTHER_VALUE = re.compile(
    r"(?<![\w.])([A-Za-z])\s*=\s*[-+]?[0-9][0-9.]*\s*(?:[,;]|\bor\b|\band\b)\s*\1\s*=(?!=)"
)
_SENTENCE_END = re.compile(r"(?<!\.\w)[.!]\s+(?=[A-Z])")
# The answer is six. So six it is. Six is the answer.
_SAID = re.compile(
    r"\b(?:(?:it|that|this|which|answer|result|total|value|sum|number)\s++(?:(?:should|must)\s++be|is"
    r"|was|equals|makes|gives)\s++(?:(?:then|therefore|thus|actually|really|in fact),?\s++)?+"
    r"(-?[0-9]++)(?=\s*+(?:[.!?;,]|$))"
    r"|(?:so|hence|thus|then|therefore|actually|hmm|make (?:that|it)),?\s++"
    r"(-?[0-9]++)(?=\s++it is\b|\s*+(?:[.!?;,]|$)))"
    r"|(-?[0-9]++)\s++is\s++the\s++(?:(?:final|right|correct)\s++)?+answer\b",
    re.IGNORECASE,
)
_IDLE_COUNTED = frozenset(
    words("more total in of each left a an the per all together altogether other for is are and")
)
_SHAPE_SIGNS = frozenset("()[]{},;:/-\N{EN DASH}\\")


def read_number(text: str, *, is_marked: bool = True) -> Reading:
    """Read the number of an answer: `-1,000`, `US$5`, `.5`, `3 1/2`, `1e-3`, `\\frac{3}{4}`,
    `18 eggs`, `4.5 million`, `6 * 7 = 42`.

    Return None without digits. A text that is marked as the answer must not have several numbers;
    in other texts, which are prose, the last number counts. 10% is 10.
    """
    if is_marked and (len(text) > _MAX_LINE_CHARACTERS or _is_cut(text)):
        return Unreadable()
    if is_struck(text):
        return Unreadable()
    line = _LEADING_DASH.sub("-", text[-_MAX_LINE_CHARACTERS:]).replace("{-}", "-")
    line = without_denied_values(plain_notation(without_wrapping(line)))
    if is_denied(line, is_marked=is_marked):
        return Unreadable()
    if ELLIPSIS.search(line):
        return Unreadable()
    if r"\ne" in line or "!=" in line:
        line = _UNEQUAL.sub(" ", line)
    line = _with_units_spelt(line)
    line = _EMPHASIS.sub(r"\2", without_remarks(line)).strip().rstrip(".")
    line = _SLASHES.sub(lambda m: m[0].replace("/", "-"), line)
    # In "22/7 is about 3.14" the first number counts, in "6 * 7 -> 42" the last.
    rounded = [piece for piece in _ABOUT.split(line) if any(map(str.isdigit, piece))]
    if not rounded:
        return None
    pieces = [piece for piece in _ARROW.split(rounded[0]) if any(map(str.isdigit, piece))]
    found = _read_equation(pieces[-1], is_marked)
    is_chain = any(_is_other(piece, found) for piece in pieces[:-1])
    is_far = any(_is_other(piece, found, tolerance=1) for piece in rounded[1:])
    return Unreadable() if is_chain or is_far else found


def _is_other(piece: str, found: Reading, tolerance: int = 0) -> bool:
    """Return whether a piece is only a number that differs from `found`. With a `tolerance` of 1, a
    number within 0.99 or 5 % of it does not differ."""
    if not isinstance(found, Amount) or not _is_bare(piece):
        return False
    reading = _read_equation(piece, True)
    if not isinstance(reading, Amount):
        return False
    distance = abs(reading.value - found.value)
    return distance > tolerance * max(Fraction(99, 100), abs(found.value) / 20)


def without_remarks(text: str) -> str:
    """Remove remarks in brackets after an answer, `5 (as wanted)`. If a remark is part of the
    answer, as in `6 (hours)` or `5 (or 6)`, remove only its brackets."""

    def kept(match: re.Match[str]) -> str:
        inner = match[1].strip()
        if inner.casefold() in SPELT:
            return f" = {SPELT[inner.casefold()]} "
        found = [word.casefold() for word in words_of(inner)]
        unit = inner.removeprefix("in ")
        is_telling = known_unit(unit) is not None or bool(
            set(found) & (CHANGING_WORDS | _TELLING_WORDS)
            or {word.removesuffix("s") for word in found} & MULTIPLIERS.keys()
        )
        if is_telling:
            return f" {unit} "
        return f" or {inner} " if is_another_remark(inner) else " "

    return _REMARK.sub(kept, text)


def _read_equation(line: str, is_marked: bool) -> Reading:
    if _ANOTHER_VALUE.search(line) or (is_marked and _NEXT_VALUE.search(line)):
        return Unreadable()
    parts = [part for part in _EQUALS.split(line) if any(map(str.isdigit, part))]
    readings = [_read(part, is_marked) for part in parts]
    found = readings[-1]
    if isinstance(found, Unreadable):
        # 42 = 6 * 7, and 7 = x
        found = next((r for r in reversed(readings) if isinstance(r, Amount)), found)
    # A number that is set equal to another one, as in 7 = 42, is not an answer.
    if isinstance(found, Amount):
        for part, reading in zip(parts, readings, strict=True):
            if _is_bare(part):
                value = reading.value if isinstance(reading, Amount) else _computed(part)
                if value is not None and value != found.value:
                    return Unreadable()
    return found


def _with_units_spelt(line: str) -> str:
    """Replace signs of currencies and units by names, and remove the dollars of formulas."""

    def after(match: re.Match[str]) -> str:
        is_own = match["country"] in (None, "US")
        name = _CURRENCIES[match["sign"][-1]] if is_own else "?"
        return f" \x02{name} {match['minus'] or ''}"

    is_formula = line.count("$") % 2 == 0 and line.count("\\$") == 0
    closing = re.search(r"(?<!\\)\$[^$]*[0-9}.]\$", line)
    if not (is_formula and closing):
        line = _MONEY.sub(after, line)
    line = _CODE.sub(lambda m: f" \x02{m[1].casefold()} ", line)
    line = _MONEY_AFTER.sub(lambda m: f" {_CURRENCIES[m[1]]} ", line)
    line = _DOLLARS.sub(" ", line).replace(r"\(", " ").replace(r"\)", " ")
    line = line.replace(r"\[", " ").replace(r"\]", " ").replace(r"\%", "%")
    line = _POWER_OF_UNIT.sub(_named_power, _PER.sub(" per ", line))
    return _DEGREE.sub(" degrees ", line)


def _named_power(match: re.Match[str]) -> str:
    is_unit = len(match[1]) > 1 or match.string[match.start() - 1] == " "
    if not is_unit or known_unit(match[1]) is None:
        return match[0]
    return f"{'square' if match[2] == '2' else 'cubic'} {match[1]}"


def _read(part: str, is_marked: bool) -> Reading:
    """Read one side of an equation."""
    numbers = list(NUMBER.finditer(part))
    if len(numbers) > _MAX_NUMBERS:
        return Unreadable()
    if len(numbers) == 1 or not (shape := _shape(part, numbers)):
        amounts = [_amount(part, numbers, i, is_marked) for i in range(len(numbers))]
        if not amounts:
            return Unreadable()
        if len(amounts) > 1 and not is_marked:
            # In prose the last number counts, unless it is one of several alternatives.
            between = part[numbers[-2].end() : numbers[-1].start()]
            is_one_of_several = not _has_word(between) or _ALTERNATIVE.fullmatch(between.strip())
            return Unreadable() if is_one_of_several else amounts[-1]
        values = {amount.value if isinstance(amount, Amount) else None for amount in amounts}
        return amounts[0] if len(values) == 1 else Unreadable()
    values = tuple(value for n in numbers if (value := value_of(n)) is not None)
    return Figures(shape, values) if len(values) == len(numbers) else Unreadable()


def _shape(part: str, numbers: list[re.Match[str]]) -> str:
    """Return the signs between numbers, with # for each number; "" if there is any other text."""
    shape = "".join(NUMBER.sub("#", part).split())
    is_shape = shape.count("#") == len(numbers) and set(shape) <= _SHAPE_SIGNS | {"#"}
    return shape if is_shape and "##" not in shape else ""


def _amount(
    part: str, numbers: list[re.Match[str]], index: int, is_marked: bool
) -> Amount | Unreadable:
    """Read one number with the text around it, up to its neighbours."""
    number = numbers[index]
    start = numbers[index - 1].end() if index else 0
    end = numbers[index + 1].start() if index + 1 < len(numbers) else len(part)
    before, after = part[start : number.start()], part[number.end() : end]
    value = value_of(number)
    said = [match[match.lastindex or 0] for match in _SAID.finditer(in_digits(after))]
    if any(Fraction(text) != value for text in said):
        return Unreadable()
    after, *remarks = _SENTENCE_END.split(after, maxsplit=1)
    if remarks and is_taken_back(remarks[0]):
        return Unreadable()
    if _BOUND_BEFORE.search(before):
        return Unreadable()
    after = without_too(before, after)
    before, money, name = before.rpartition("\x02")
    unit = UNITS.get(name.strip(" -+")) if money else None
    if not money:
        before = name
    words_before = [word.casefold() for word in words_of(before)]
    if _BOUND_AFTER.match(after) or _DATE_AFTER.match(after) or _DATE_BEFORE.search(before):
        return Unreadable()
    is_whole = not (
        begins_before(before, is_marked=is_marked) or ends_behind(after, is_marked=is_marked)
    )
    is_primed = after.startswith("'") and not before.endswith("'")
    if value is None or not is_whole or is_primed or _is_in_list(before, after):
        return Unreadable()
    if words_before and words_before[-1] in _NEGATING_WORDS:
        value = -value
    for word in words_of(after)[:2]:
        value *= _multiplier(word.casefold()) or 1
    if unit is None and "%" in after[:2]:
        unit = UNITS["%"]
    unit = _unit_after(after, unit)
    found = [word for word in words_of(after)[:3] if not _multiplier(word.casefold())]
    counted = [word for word in found if word.casefold() not in _IDLE_COUNTED]
    is_counted = unit is None and not any(map(known_unit, counted))
    return Amount(value, unit, counted[0].casefold() if counted and is_counted else "")


def _multiplier(word: str) -> int | None:
    return MULTIPLIERS.get(word.removesuffix("s"))


def _unit_after(after: str, unit: Unit | None) -> Unit | None:
    """Read the unit after a number: km, square km, km per hour. `unit` is the part of it that is
    already known."""
    match = _UNIT_AFTER.match(after)
    if match is None:
        return unit
    if unit is None:
        named = known_unit(match["name"] or "")
        if named is None:
            return None
        exponent = {"s": 2, "c": 3}.get((match["power"] or " ")[0].casefold(), 1)
        unit = named if exponent == 1 else (f"{named[0]}^{exponent}", named[1] ** exponent)
    elif match["name"] and not known_unit(match["name"]):
        return unit
    other = known_unit(match["per"] or "")
    if match["per"] is None or (other is None and match["rate"] != "per"):
        return unit
    kind, size = other or (match["per"].casefold().removesuffix("s"), Fraction(1))
    # Speeds also have their own names, such as mph.
    kind = "speed" if (unit[0], kind) == ("length", "time") else f"{unit[0]} per {kind}"
    return kind, unit[1] / size


def _is_in_list(before: str, after: str) -> bool:
    """Return whether a number is a coordinate, as in (x, 5)."""
    opened = max(before.rfind(bracket) for bracket in "([{")
    if opened < max(before.rfind(bracket) for bracket in ")]}") or opened < 0:
        return False
    inside = before[opened:] + re.split(r"[)\]}]", after, maxsplit=1)[0]
    return "," in inside or ";" in inside


def _is_cut(text: str) -> bool:
    """Return whether a bracket before the first number is not closed: (5"""
    before = re.match("[^0-9]*", text)[0]  # pyright: ignore[reportOptionalSubscript]
    return any(
        before.rfind(opening) > before.rfind(closing) and closing not in text[len(before) :]
        for opening, closing in ("()", "[]", "{}")
    )


def _has_word(text: str) -> bool:
    return any(len(word) > 1 for word in words_of(text))


def _is_bare(part: str) -> bool:
    """Return whether one side of an equation has no words."""
    return not re.search(r"[^\W\d_]", re.sub(r"\\[A-Za-z]+", "", part))


def _computed(part: str) -> Fraction | None:
    result = evaluate_arithmetic(re.sub(r"\\times|\\cdot", "*", part).replace(r"\div", "/"))
    return None if result is None else result[0]
