"""Answers that are read as one unit: words, times, dates, ratios, numbers in a base, residues."""

import re
from fractions import Fraction

from rlad.tasks.answer_kinds import Answer, Based, Colons, Date, Residue, Text, Time
from rlad.tasks.formula_tokens import FUNCTIONS
from rlad.tasks.formulas import Unreadable, product_of

_LETTERS_ONLY = re.compile(
    r"^[(\[]?\s*[^\W\d_]+(?:[\s,.;:'\"()&!?-]+[^\W\d_]+)*[\s.,)\]]*$|^[^\W\d_]{4,}[!?'\"]$"
)
_LETTER_FORMULA = re.compile(r"[^\W\d_]\s*-\s*[^\W\d_]|[^\W\d_]\(")
_FORMULA_WORDS = FUNCTIONS.keys() | {"pi", "sqrt", "infty", "infinity", "inf", "oo"}
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
RUN_OF_NUMBERS = re.compile(
    r"^[0-9]+(?:\s*[-\N{EN DASH}]\s*[0-9]+)+$|^[0-9]+(?:\s*/\s*[0-9]+){2,}$"
)
_BASED = re.compile(r"^\(?\s*([0-9A-Fa-f ]+?)\s*\)?\s*_\s*\{?\s*\(?([0-9]{1,2})\)?\s*\}?$")
_BASE_WORDS = re.compile(r"^([0-9A-Fa-f]+)\s*(?:\(\s*)?(?:in )?base\s*\{?([0-9]{1,2})\}?\s*\)?$")
_PREFIXED = re.compile(r"^0([xXbBoO])([0-9A-Fa-f]+)$")
_RESIDUE = re.compile(
    r"^(?:[A-Za-z]\s*\\equiv\s*)?(-?[0-9]+)\s*\(?\s*(?:\\p?mod|\\bmod|\\pod|mod(?:ulo)?)"
    r"\s*\{?\s*\(?([0-9]+)\)?\s*\}?\s*\)?$"
)


def read_whole(bare: str) -> Answer | None:
    """Read an answer that is one unit: a text, a time, a date, a number in a base, ...; None for
    other answers."""
    if _LETTERS_ONLY.match(bare) and not (_is_formula_word(bare) or _is_letter_formula(bare)):
        words = bare.casefold().strip(" .!?\"'")
        inner = re.sub(r"^\(\s*(\w+)\s*\)$", r"\1", words)
        letters = bare.replace(" ", "").strip("().!?\"'")
        written = bare.strip(" ().!?\"'")
        return Text(inner, written, product_of(letters) if len(letters) <= 3 else None)
    if calendar := _read_calendar(bare):
        return calendar
    if RUN_OF_NUMBERS.match(bare):
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
    has_digits = 2 <= int(base) <= 36 and all(int(d, 36) < int(base) for d in digits if d != " ")
    if is_number and not has_digits:
        raise Unreadable(digits)
    return is_number


def _is_formula_word(bare: str) -> bool:
    """Return whether words are functions, constants and variables: pi, sin(x)."""
    found = re.findall(r"[^\W\d_]+", bare)
    are_known = all(word.lower() in _FORMULA_WORDS or len(word) == 1 for word in found)
    return are_known and (any(len(w) > 1 for w in found) or all(w.lower() in "ei" for w in found))


def _is_letter_formula(bare: str) -> bool:
    """Return whether letters are variables: a - b, n(N-n)."""
    are_short = all(len(word) <= 2 for word in re.findall(r"[^\W\d_]+", bare))
    is_formula = are_short and _LETTER_FORMULA.search(bare) is not None
    return is_formula and product_of(bare) is not None
