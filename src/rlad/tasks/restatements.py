r"""The value of an answer given once more, which is no other answer: `10/2, or \boxed{5}`,
`300 seconds, or \boxed{5} minutes`, `$x=5$ ($\boxed{5}$)`; or another one in the lines after it."""

import re
from fractions import Fraction

from rlad.tasks.notation import words
from rlad.tasks.units import LARGE_NUMBERS, known_unit

_FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*([0-9]+)\s*\}\s*\{\s*([0-9]+)\s*\}")
_NUMBER = r"-?[0-9]+(?:\.[0-9]+)?(?:/[0-9]+)?"
# Behind other words a number may be one of several, or a part of a formula.
_ALONE = r"(?:^|[:;.!]\s|=|\b(?:is|was|are|equals|equal to|gives?|get|have|has|makes?)\s)\s*"
_OR_BEFORE = re.compile(
    rf"{_ALONE}({_NUMBER})(?:\s+([a-z]+))?\s*,?\s+or\s+(?:rather\s+)?$", re.IGNORECASE
)
_OR_AFTER = re.compile(
    rf"[\s)]*,?\s*\(?or\s+(?:equivalently,?\s+|simply\s+|just\s+)?({_NUMBER})[\s).!]*$",
    re.IGNORECASE,
)
_VALUE_ALONE = re.compile(
    r"(?:[a-z]\s*)?=*+\s*+(-?[0-9][0-9.,]*+(?:/[0-9]+)?)\s*+%?[\s.!]*+", re.IGNORECASE
)
_IS_STATED = re.compile(
    r"\b(?:answer|result|solution)\s+(?:(?:to|of|for|here|then)\b[^.;:=?!]{0,80}?)?"
    r"(?:is|was|equals|(?:should|must|would|could|might|may|will) be|becomes|[:=])\s*+:?\s*+"
    r"(?:(?:actually|really|instead|in fact|also|then|therefore|thus),?\s++)*+"
    r"(?P<said>-?[0-9][0-9.,]*+(?:/[0-9]+)?|[^\W\d_]++(?=\W*$))",
    re.IGNORECASE,
)
_NUMBER_WORDS = frozenset(
    words(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
        "fifteen sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy "
        "eighty ninety infinity pi none undefined"
    )
) | set(LARGE_NUMBERS)
_SAYS_NOTHING = frozenset(
    words(
        "correct right exact verified unique consistent confirmed above below boxed so final valid "
        "simplified rounded reasonable true clear obvious this that it positive negative integer "
        "unchanged following complete finished done proven proved"
    )
)
_SEVERAL = re.compile(r"\b(?:or|either|neither|nor|maybe|perhaps|possibly)\b", re.IGNORECASE)
_SETTING = re.compile(r"\\[()\[\]]|[$*`{}]|\\(?:text\w*|qquad|quad|[,;:! ])")


def same_number(one: str, other: str) -> bool:
    """Say whether two texts are the same number: `10/2` is `5.0`."""
    values = _value(one), _value(other)
    return values[0] is not None and values[0] == values[1]


def _value(text: str) -> Fraction | None:
    text = _plain(text).strip()
    try:
        return Fraction(text) if re.fullmatch(_NUMBER, text) else None
    except ZeroDivisionError:
        return None


def _plain(text: str) -> str:
    return _SETTING.sub("", _FRACTION.sub(r"\1/\2", text))


def is_restated_before(said: str, found: str, right: str) -> bool:
    """Say whether a text that ends with `or` gives what a box after it gives."""
    said = _plain(said.replace(r"\boxed", ""))
    other = _OR_BEFORE.search(said)
    if other is None or _SEVERAL.search(said[: other.start()]):
        return False
    if other[2] is None:
        return same_number(other[1], found)
    following = re.match(r"\s*([A-Za-z]+)[\s.!]*$", _plain(right))
    units = known_unit(other[2]), known_unit(following[1] if following else "")
    values = _value(other[1]), _value(found)
    if None in units or None in values:
        return False
    (kind, size), (own_kind, own_size) = units  # pyright: ignore
    return kind == own_kind and values[0] * size == values[1] * own_size  # pyright: ignore


def is_restated_after(right: str, found: str) -> bool:
    """Say whether what follows a box only gives its value once more: `or 5.0`."""
    other = _OR_AFTER.match(_plain(right))
    return other is not None and same_number(other[1], found)


def gives_another(remarks: str, found: str) -> bool:
    """Say whether the lines after an answer give another one: a line with nothing but a number, or
    `the answer is 6`."""
    own = _plain(found)
    is_number = re.fullmatch(r"[^\W\d_]?\s*+=?\s*+[-0-9.,/]++\W*+", own.strip()) is not None
    for line in map(_plain, remarks.splitlines()):
        alone = _VALUE_ALONE.fullmatch(line.strip()) if is_number else None
        said = [alone[1]] if alone else [match["said"] for match in _IS_STATED.finditer(line)]
        if any(not _is_said_of(text, own) for text in said):
            return True
    return False


def _is_said_of(said: str, own: str) -> bool:
    """Say whether a number or a word stands in an answer, or says nothing about it."""
    if not re.search("[0-9]", said):
        if re.search("[0-9]", own):
            return said.casefold() not in _NUMBER_WORDS
        own_words = re.findall(r"[^\W\d_]+", own.casefold())
        return said.casefold() in (*own_words, *_SAYS_NOTHING)
    numbers = re.findall(_NUMBER, own.replace(",", ""))
    return any(same_number(said.replace(",", "").rstrip("."), number) for number in numbers)


def ends_with_value(left: str, found: str) -> bool:
    """Say whether a text ends with what a box after it holds, apart from it: `x = 5 (`."""
    value = re.escape(found)
    # Without a comma, or the end of a formula, 5 (5) is a product.
    apart = r"(?:(?:\$|\\\)),?|,)\s+[(*_`\"'\s]*(?:\$+|\\\()?\s*$"
    end = rf"(?:^|[^\W\d]\s|\$)\s*{value}\s*{apart}"
    return re.search(end, left) is not None
