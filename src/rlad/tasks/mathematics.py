r"""The verifier `math`: whether two answers are mathematically equal.

Both answers are read as a whole (`rlad.tasks.math_answers`). An answer that is not understood
completely cannot be judged, unless both are written in the same way. Values are compared exactly,
or, if they have variables, to 100 digits at several points. If this is not conclusive, math-verify
decides.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import sympy
from sympy import Rational

from rlad.tasks.answer_kinds import (
    Answer,
    Based,
    Colons,
    Date,
    Equation,
    Interval,
    Matrix,
    NotRead,
    Residue,
    Several,
    Text,
    Time,
    Value,
    as_interval,
)
from rlad.tasks.answers import final_answer, first_line
from rlad.tasks.base import Judgement, cannot_judge, judged
from rlad.tasks.math_answers import read_answer
from rlad.tasks.notation import words
from rlad.tasks.quantities import (
    LONG_NAME,
    Compared,
    same_equation,
    same_quantity,
    same_value,
)
from rlad.tasks.surroundings import CHANGING_WORDS
from rlad.tasks.units import MULTIPLIERS

_PLACEHOLDERS = frozenset(
    words("proof notfound n/a na none null nan unknown undefined? ? - -- unanswerable todo tbd")
) | {"", "not found", "no answer", "see solution", "not available", "no solution found", "..."}
_PLAIN_WORDS = re.compile(r"[\w\s.;'\"!?]*")
_UNFINISHED = re.compile(r"[0-9\s.+*=-]*[+*=-]")
_CALCULATING = CHANGING_WORDS | MULTIPLIERS.keys() | {f"{name}s" for name in MULTIPLIERS}
_SHORT_WORDS = frozenset(
    words("yes no all odd one two six ten of the in on to is it or and at by not for red max min")
)
_MAX_ITEMS = 30


def judge_math(completion: str, answer: str) -> Judgement:
    """Judge whether a completion's final answer is mathematically equal to `answer`."""
    text = first_line(final_answer(answer))
    wanted = read_answer(text)
    if _is_placeholder(text, wanted):
        return cannot_judge(f"the reference answer {text[:80]!r} says that there is none")
    found = first_line(final_answer(completion))
    if not found:
        return judged(False)
    is_equal = compare(read_answer(found), wanted)
    if is_equal is None:
        return cannot_judge(f"{found[:60]!r} cannot be compared with {text[:60]!r}")
    return judged(is_equal)


def _is_placeholder(text: str, wanted: Answer) -> bool:
    texts = [text.strip(" .")] + ([wanted.words] if isinstance(wanted, Text) else [])
    return any(one.casefold() in _PLACEHOLDERS for one in texts)


def compare(found: Answer, wanted: Answer) -> Compared:
    """Return whether two answers are equal; None if this cannot be decided."""
    if isinstance(found, NotRead) or isinstance(wanted, NotRead):
        return _not_read(found, wanted)
    if isinstance(found, Text) or isinstance(wanted, Text):
        return _same_text(found, wanted)
    for kind, rule in _RULES:
        if isinstance(found, kind) and isinstance(wanted, kind):
            return rule(found, wanted)
    if isinstance(found, Several) or isinstance(wanted, Several):
        return _one_and_several(found, wanted)
    return _of_two_kinds(found, wanted)


def _not_read(found: Answer, wanted: Answer) -> Compared:
    if isinstance(found, NotRead) and (found.is_false or found == wanted):
        return not found.is_false
    if isinstance(found, NotRead) and found.is_denied and isinstance(wanted, Value):
        return False
    # A readable text is not equal to an answer that could not be read.
    if isinstance(found, Text) and len(found.words) > 1:
        return False
    return False if isinstance(wanted, Value) and _lacks(found, wanted) else None


def _lacks(found: Answer, wanted: Value) -> bool:
    """Return whether a text that cannot be read does not contain the wanted number."""
    if not isinstance(found, NotRead) or not wanted.expression.is_Rational:
        return False
    text = found.written.casefold().replace(",", "")
    if not (_PLAIN_WORDS.fullmatch(text) or _UNFINISHED.fullmatch(text)) or _CALCULATING & set(
        re.findall(r"[a-z]+", text)
    ):
        return False
    size = abs(wanted.expression)
    return all(Rational(number) != size for number in re.findall(r"[0-9]+(?:\.[0-9]+)?", text))


def _of_two_kinds(found: Answer, wanted: Answer) -> Compared:
    if isinstance(found, Based) or isinstance(wanted, Based):
        return _with_and_without_base(found, wanted)
    kinds = {type(found), type(wanted)}
    if kinds == {Value, Equation}:
        return _value_and_equation(found, wanted)
    if kinds == {Time, Colons}:
        return None
    if Value in kinds and kinds & {Time, Residue}:
        return _value_and_other(found, wanted)
    return False


# --- texts ----------------------------------------------------------------------------------------


def _same_text(found: Answer, wanted: Answer) -> Compared:
    if isinstance(found, Text) and isinstance(wanted, Text):
        if found.words == wanted.words:
            # X and x are two variables or one choice; AB and ab, Aa and AA may differ, too.
            return None if _may_differ_in_case(found.written, wanted.written) else True
        # As a product ab equals ba; other words do not.
        is_product = {len(found.words), len(wanted.words)} == {2} and (
            found.written.islower() and wanted.written.islower()
        )
        return None if is_product and sorted(found.words) == sorted(wanted.words) else False
    text, other = (found, wanted) if isinstance(found, Text) else (wanted, found)
    assert isinstance(text, Text)
    if isinstance(other, Value) and text.product is not None:
        return same_value(text.product, other.expression) if not other.unit else False
    if isinstance(other, Several) and not other.items:
        return text.words in ("no solution", "no solutions", "no real solution", "none")
    return False


def _may_differ_in_case(a: str, b: str) -> bool:
    """Return whether letters of two texts that differ only in case may be symbols."""
    sides = [re.findall(r"[^\W\d_]+", text) for text in (a, b)]
    is_prose = any(_is_word(word) and len(word) >= LONG_NAME for word in sides[0])
    for x, y in zip(*sides, strict=False):
        is_first_letter = is_prose and len(x) > 1 and x.upper() not in (x, y)
        are_words = (_is_word(x) and _is_word(y)) or (is_first_letter and x[1:] == y[1:])
        if x != y and not are_words:
            return True
    return False


def _is_word(text: str) -> bool:
    if not (text.islower() or text.isupper() or text.istitle()):
        return False
    return len(text) >= LONG_NAME or text.casefold() in _SHORT_WORDS


# --- several values -------------------------------------------------------------------------------


def _same_several(found: Several, wanted: Several) -> Compared:
    if len(found.items) > _MAX_ITEMS or len(wanted.items) > _MAX_ITEMS:
        return None
    kinds = {found.kind, wanted.kind}
    if kinds == {"list"} and found.brackets != wanted.brackets:
        return None
    if kinds == {"tuple"}:
        is_equal = _in_order(found.items, wanted.items)
        # A vector may have any brackets; with two items they may be those of an interval.
        if is_equal and found.brackets != wanted.brackets and len(found.items) == 2:
            return False
        return is_equal
    if kinds == {"set"}:
        return _each_in_other(found.items, wanted.items)
    rule = _each_in_other if "set" in kinds else _in_any_order
    names = [_names(side.items) for side in (found, wanted)]
    are_named = ["" not in n and len(set(n)) > 1 for n in names]
    if all(are_named):
        return _by_name(found.items, wanted.items, *names)
    if not any(are_named) and "tuple" not in kinds:
        return rule(found.items, wanted.items)
    # x = 1, y = 2 equals (1, 2), and so does 1, 2; [1, 2] may be an interval.
    sides = [
        [item for _, item in sorted(zip(n, side.items, strict=False), key=lambda pair: pair[0])]
        if is_named and len(n) == len(side.items)
        else side.items
        for n, side, is_named in zip(names, (found, wanted), are_named, strict=True)
    ]
    is_ordered = "set" not in kinds and "[]" not in (found.brackets, wanted.brackets)
    if is_ordered and _in_order(*sides):
        return True
    return None if _each_in_other(found.items, wanted.items) else False


def _names(items: Sequence[Answer]) -> list[str]:
    return [item.name for item in items if isinstance(item, Value)]


def _by_name(
    found: Sequence[Answer], wanted: Sequence[Answer], names: list[str], others: list[str]
) -> Compared:
    if sorted(names) != sorted(others) or len(names) != len(found) or len(others) != len(wanted):
        return False
    order = [names.index(name) for name in others]
    if len(set(names)) < len(names):
        return _in_any_order(found, wanted)
    return _in_order([found[i] for i in order], wanted)


def _in_order(found: Sequence[Answer], wanted: Sequence[Answer]) -> Compared:
    if len(found) != len(wanted):
        return False
    return _all(compare(_plain(a), _plain(b)) for a, b in zip(found, wanted, strict=True))


def _plain(item: Answer) -> Answer:
    return item.unnamed() if isinstance(item, Value) else item


def _all(results: Any) -> Compared:
    is_unknown = False
    for result in results:
        if result is False:
            return False
        is_unknown |= result is None
    return None if is_unknown else True


def _in_any_order(found: Sequence[Answer], wanted: Sequence[Answer]) -> Compared:
    if len(found) != len(wanted):
        return False
    left = list(wanted)
    is_unknown = False
    for item in found:
        results = [compare(item, other) for other in left]
        if True in results:
            left.pop(results.index(True))
        elif None in results:
            is_unknown = True
        else:
            return False
    return None if is_unknown else True


def _each_in_other(found: Sequence[Answer], wanted: Sequence[Answer]) -> Compared:
    return _all(
        _one_of(item, others)
        for items, others in ((found, wanted), (wanted, found))
        for item in items
    )


def _one_of(item: Answer, others: Sequence[Answer]) -> Compared:
    results = [compare(item, other) for other in others]
    return True if True in results else None if None in results else False


def _one_and_several(found: Answer, wanted: Answer) -> Compared:
    several, other = (found, wanted) if isinstance(found, Several) else (wanted, found)
    assert isinstance(several, Several)
    if isinstance(other, Value) and other.is_grouped:
        return None  # 100,200 is one number or two
    if isinstance(other, Matrix):
        return _vector_and_tuple(other, several)
    if isinstance(other, Interval):
        if several.kind == "tuple" and len(several.items) == 2:
            return _same_interval(as_interval(several), other)
        is_list = all(isinstance(item, Interval) for item in several.items)
        return None if is_list else False
    if several.items and several.kind == "set":
        return _all(compare(item, other) for item in several.items)
    return False


def _vector_and_tuple(matrix: Matrix, several: Several) -> Compared:
    """Compare a column or a row with coordinates in round or angle brackets."""
    rows = [list(row) for row in matrix.rows]
    is_vector = len(rows) == 1 or all(len(row) == 1 for row in rows)
    if not is_vector or several.kind != "tuple" or several.brackets == "[]":
        return False
    return _in_order([item for row in rows for item in row], several.items)


def _same_interval(found: Interval, wanted: Interval) -> Compared:
    if found.name and wanted.name and found.name != wanted.name:
        return False
    if (found.is_left_open, found.is_right_open) != (wanted.is_left_open, wanted.is_right_open):
        return False
    return _in_order([found.left, found.right], [wanted.left, wanted.right])


# --- others ---------------------------------------------------------------------------------------


def _value_and_other(found: Answer, wanted: Answer) -> Compared:
    """Compare a number with a time or a residue. The number may be short for either."""
    value, other = (found, wanted) if isinstance(found, Value) else (wanted, found)
    assert isinstance(value, Value)
    if not value.expression.is_Integer:
        return False
    if isinstance(other, Time):
        return None if value.expression % 12 == other.hour % 12 else False
    assert isinstance(other, Residue)
    return None if (value.expression - other.value) % (other.modulus or 1) == 0 else False


def _value_and_equation(found: Answer, wanted: Answer) -> Compared:
    value, equation = (found, wanted) if isinstance(found, Value) else (wanted, found)
    assert isinstance(value, Value) and isinstance(equation, Equation)
    if len(value.name) != 1 or equation.sign != "=":
        return False
    return same_equation(Equation("=", sympy.Symbol(value.name) - value.expression), equation)


def _same_matrix(found: Matrix, wanted: Matrix) -> Compared:
    if [len(row) for row in found.rows] != [len(row) for row in wanted.rows]:
        return False
    return _all(_in_order(row, other) for row, other in zip(found.rows, wanted.rows, strict=True))


def _same_base(found: Based, wanted: Based) -> Compared:
    if found.value != wanted.value:
        return False
    return True if found.base == wanted.base else None


def _with_and_without_base(found: Answer, wanted: Answer) -> Compared:
    based, other = (found, wanted) if isinstance(found, Based) else (wanted, found)
    assert isinstance(based, Based)
    if not isinstance(other, Value):
        return False
    # The base may be given in the question, or the digits may be decimal.
    is_alike = other.expression in (based.value, based.as_decimal)
    return None if is_alike else False


def _same_colons(found: Colons, wanted: Colons) -> Compared:
    if found.values == wanted.values:
        return True
    if len(found.values) != len(wanted.values) or 0 in found.values or 0 in wanted.values:
        return False
    quotients = {a / b for a, b in zip(found.values, wanted.values, strict=True)}
    if len(quotients) > 1:
        return False
    # A ratio can be reduced, a time cannot.
    return None if found.may_be_time and wanted.may_be_time else True


def _same_residue(found: Residue, wanted: Residue) -> Compared:
    if found.modulus != wanted.modulus or wanted.modulus == 0:
        return False
    return (found.value - wanted.value) % wanted.modulus == 0


def _equal(found: Answer, wanted: Answer) -> Compared:
    return found == wanted


_RULES: tuple[tuple[type, Callable[[Any, Any], Compared]], ...] = (
    (Value, same_quantity),
    (Several, _same_several),
    (Interval, _same_interval),
    (Equation, same_equation),
    (Matrix, _same_matrix),
    (Based, _same_base),
    (Colons, _same_colons),
    (Residue, _same_residue),
    (Time, _equal),
    (Date, _equal),
)
