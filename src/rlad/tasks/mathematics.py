r"""The verifier `math`: whether two answers are mathematically equal.

Both answers are read whole (`rlad.tasks.math_answers`): what is not understood to its last sign
cannot be judged, unless both are written alike. Values are compared exactly, or to 100 digits at
several points where they have variables; where that decides nothing, math-verify does.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import sympy
from sympy import Rational

from rlad.tasks.answers import final_answer, first_line
from rlad.tasks.base import Judgement, cannot_judge, judged
from rlad.tasks.formulas import LOG_BASE
from rlad.tasks.math_answers import (
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
    read_answer,
)
from rlad.tasks.notation import words
from rlad.tasks.numbers import CHANGING_WORDS
from rlad.tasks.units import MULTIPLIERS

_PLACEHOLDERS = frozenset(
    words("proof notfound n/a na none null nan unknown undefined? ? - -- unanswerable todo tbd")
) | {"", "not found", "no answer", "see solution", "not available", "no solution found", "..."}
_POINTS = tuple(
    tuple(Rational(sign * a, b) for a, b, sign in row)
    for row in (
        ((7, 5, 1), (11, 13, 1), (17, 7, 1), (23, 19, 1), (29, 31, 1), (37, 11, 1)),
        ((19, 17, 1), (5, 3, 1), (3, 23, 1), (41, 29, 1), (13, 7, 1), (43, 37, 1)),
        ((53, 23, -1), (31, 11, 1), (5, 29, -1), (7, 3, -1), (61, 13, 1), (2, 17, -1)),
        ((3, 47, 1), (67, 19, -1), (71, 7, -1), (11, 5, 1), (13, 53, -1), (79, 3, 1)),
        ((83, 7, 1), (89, 41, 1), (97, 13, 1), (3, 5, -1), (101, 17, -1), (7, 59, -1)),
    )
)
_DIGITS_OF_A_ROUNDED_VALUE = 6
_PLAIN_WORDS = re.compile(r"[\w\s.;'\"!?]*")
_UNFINISHED = re.compile(r"[0-9\s.+*=-]*[+*=-]")
_CALCULATING = CHANGING_WORDS | MULTIPLIERS.keys() | {f"{name}s" for name in MULTIPLIERS}
_SHORT_WORDS = frozenset(
    words("yes no all odd one two six ten of the in on to is it or and at by not for red max min")
)
_MAX_ITEMS = 30
_LONG_NAME = 4

Compared = bool | None
"""Whether two answers are equal; None where that cannot be said"""


def judge_math(completion: str, answer: str) -> Judgement:
    """Judge whether the final answer of a completion is mathematically equal to `answer`."""
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
    """Say whether two answers are equal."""
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
    # No text says what we could not read.
    if isinstance(found, Text) and len(found.words) > 1:
        return False
    return False if isinstance(wanted, Value) and _lacks(found, wanted) else None


def _lacks(found: Answer, wanted: Value) -> bool:
    """Say whether words that are not understood lack the number that is wanted."""
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


# --- values ---------------------------------------------------------------------------------------


def same_value(a: Any, b: Any) -> Compared:
    """Say whether two expressions have the same value, everywhere if they have variables."""
    if a == b:
        return True
    if a.is_Rational and b.is_Rational:
        return False
    infinite = {sympy.oo, -sympy.oo, sympy.zoo, sympy.nan}
    if a in infinite or b in infinite:
        return None if a in {sympy.zoo, sympy.nan} or b in {sympy.zoo, sympy.nan} else False
    symbols = sorted(a.free_symbols | b.free_symbols, key=str)
    if a.atoms(sympy.core.function.AppliedUndef) | b.atoms(sympy.core.function.AppliedUndef):
        return _by_math_verify(a, b)
    if LOG_BASE in symbols:
        return _same_for_some_base(a, b)
    if len(symbols) > len(_POINTS[0]):
        return None
    num_equal = 0
    for point in _POINTS if symbols else ((),):
        at = dict(zip(symbols, point, strict=False))
        is_equal = _same_number(a.subs(at), b.subs(at))
        if is_equal is False:
            return False
        num_equal += is_equal is True
    enough = 3 if symbols else 1
    return True if num_equal >= enough else _by_math_verify(a, b)


def _same_number(a: Any, b: Any) -> Compared:
    """Compare two numbers to 100 digits of the larger one; None where one is undefined."""
    try:
        sizes = [abs(complex_value(x)) for x in (a, b)]
        difference = abs(complex_value(a - b))
    except (TypeError, ValueError, ArithmeticError):
        return None
    return bool(difference <= max(sizes) * sympy.Float("1e-100", 30))


def complex_value(expression: Any) -> Any:
    """Evaluate a number; `ValueError` where it has no finite value."""
    value = sympy.N(expression, 20, maxn=400)
    if not value.is_number or value.has(sympy.nan, sympy.zoo, sympy.oo):
        raise ValueError("not a finite number")
    real, imaginary = value.as_real_imag()
    if not (real.is_Number and imaginary.is_Number):
        raise ValueError("not evaluated")
    return real + sympy.I * imaginary


def _same_for_some_base(a: Any, b: Any) -> Compared:
    if _same_number_for_all(a, b):
        return True
    either = [same_value(a.subs(LOG_BASE, base), b.subs(LOG_BASE, base)) for base in (sympy.E, 10)]
    return False if either == [False, False] else None


def _same_number_for_all(a: Any, b: Any) -> bool:
    plain = sympy.Symbol("b_0", positive=True)
    return same_value(a.subs(LOG_BASE, plain), b.subs(LOG_BASE, plain)) is True


def _by_math_verify(a: Any, b: Any) -> Compared:
    from math_verify import verify

    # It says False of what it cannot simplify, too.
    return True if verify(a, b, timeout_seconds=None) else None


def _same_quantity(found: Value, wanted: Value) -> Compared:
    if found.name and wanted.name and found.name != wanted.name:
        is_equal = _same_quantity(found.unnamed(), wanted.unnamed())
        if is_equal is not True:
            return is_equal
        if len(found.name) == len(wanted.name) == 1:
            return False
        # A = 25 may be what "area: 25" is, and y may be f(x).
        short, long = sorted((found.name, wanted.name), key=len)
        return True if len(short) < 3 and len(long) >= _LONG_NAME and long.isalpha() else None
    if not (found.unit and wanted.unit):
        return _without_unit(found, wanted)
    if found.unit.size and wanted.unit.size:
        if found.unit.kind != wanted.unit.kind:
            return False
        a, b = (value.expression * value.unit.size for value in (found, wanted) if value.unit)
        return same_value(a, b)
    is_equal = _close(found, wanted)
    a, b = set(found.unit.kind), set(wanted.unit.kind)
    if a == b or not is_equal:
        return is_equal
    # 18 chicken eggs are 18 eggs; whether 18 apples are is not ours to say.
    is_part = not (found.unit.size or wanted.unit.size) and (a <= b or b <= a)
    return True if is_part else None


def _without_unit(found: Value, wanted: Value) -> Compared:
    """Compare where one says no unit: 18 eggs are 18; 10% are 10 and .1."""
    is_equal = _close(found, wanted)
    if is_equal:
        # 5m may be five metres, or a product.
        return None if _may_be_product(found, wanted) else True
    for value, other in ((found, wanted), (wanted, found)):
        if value.product is not None and other.unit is None:
            return same_value(value.product, other.expression)
        scale = value.unit.scale if value.unit and not other.unit else None
        if scale is not None and same_value(value.expression * scale, other.expression):
            return True
    return is_equal


def _may_be_product(found: Value, wanted: Value) -> bool:
    return (found.product is None) != (wanted.product is None)


def _close(found: Value, wanted: Value) -> Compared:
    """Compare numbers; a decimal of six digits or more may be the rounding of another number that
    no decimal writes in full."""
    is_equal = same_value(found.expression, wanted.expression)
    if is_equal is not False:
        return is_equal
    for rounded, exact in ((found, wanted), (wanted, found)):
        if rounded.num_digits < _DIGITS_OF_A_ROUNDED_VALUE or _is_decimal(exact.expression):
            continue
        if exact.expression.free_symbols:
            continue
        try:
            distance = abs(complex_value(exact.expression - rounded.expression))
        except (TypeError, ValueError, ArithmeticError):
            continue
        if bool(2 * distance <= rounded.last_place):
            return True
    return False


def _is_decimal(number: Any) -> bool:
    """Say whether a decimal with an end writes a number in full."""
    if not number.is_Rational:
        return False
    rest = int(number.q)
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return rest == 1


# --- texts ----------------------------------------------------------------------------------------


def _same_text(found: Answer, wanted: Answer) -> Compared:
    if isinstance(found, Text) and isinstance(wanted, Text):
        if found.words == wanted.words:
            # X and x are two variables, or one choice; AB and ab, Aa and AA may be two things.
            return None if _may_differ_in_case(found.written, wanted.written) else True
        # ab is ba as a product, and no other word is.
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
    """Say whether letters of two texts that differ in case only may be symbols."""
    sides = [re.findall(r"[^\W\d_]+", text) for text in (a, b)]
    is_prose = any(_is_word(word) and len(word) >= _LONG_NAME for word in sides[0])
    for x, y in zip(*sides, strict=False):
        is_first_letter = is_prose and len(x) > 1 and x.upper() not in (x, y)
        are_words = (_is_word(x) and _is_word(y)) or (is_first_letter and x[1:] == y[1:])
        if x != y and not are_words:
            return True
    return False


def _is_word(text: str) -> bool:
    if not (text.islower() or text.isupper() or text.istitle()):
        return False
    return len(text) >= _LONG_NAME or text.casefold() in _SHORT_WORDS


# --- several values -------------------------------------------------------------------------------


def _same_several(found: Several, wanted: Several) -> Compared:
    if len(found.items) > _MAX_ITEMS or len(wanted.items) > _MAX_ITEMS:
        return None
    kinds = {found.kind, wanted.kind}
    if kinds == {"list"} and found.brackets != wanted.brackets:
        return None
    if kinds == {"tuple"}:
        is_equal = _in_order(found.items, wanted.items)
        # A vector has brackets of any kind; with two items they may be an interval's.
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
    # x = 1, y = 2 is (1, 2), and so is 1, 2; [1, 2] may be an interval.
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
        return None  # 100,200 is one number, or two
    if isinstance(other, Interval):
        if several.kind == "tuple" and len(several.items) == 2:
            return _same_interval(as_interval(several), other)
        is_list = all(isinstance(item, Interval) for item in several.items)
        return None if is_list else False
    if several.items and several.kind == "set":
        return _all(compare(item, other) for item in several.items)
    return False


def _same_interval(found: Interval, wanted: Interval) -> Compared:
    if found.name and wanted.name and found.name != wanted.name:
        return False
    if (found.is_left_open, found.is_right_open) != (wanted.is_left_open, wanted.is_right_open):
        return False
    return _in_order([found.left, found.right], [wanted.left, wanted.right])


# --- others ---------------------------------------------------------------------------------------


def _same_equation(found: Equation, wanted: Equation) -> Compared:
    """Say whether one is a multiple of the other."""
    if found.sign != wanted.sign:
        return False
    a: Any = found.expression
    b: Any = wanted.expression
    if a.is_zero or b.is_zero:
        return None if a.is_zero and b.is_zero else False  # x = x says nothing
    ratio = sympy.cancel(a / b)
    if not ratio.free_symbols and ratio.is_number and ratio != 0:
        if found.sign in ("=", r"\ne"):
            return True
        return True if ratio.is_positive else False if ratio.is_negative else None
    symbols = sorted(a.free_symbols | b.free_symbols, key=str)
    if a.free_symbols != b.free_symbols or not symbols:
        return False
    ratios = []
    for point in _POINTS[:3]:
        at = dict(zip(symbols, point, strict=False))
        ratios.append((a.subs(at), b.subs(at)))
    (p, q), *others = ratios
    return False if any(_same_number(p * s, q * r) is False for r, s in others) else None


def _value_and_other(found: Answer, wanted: Answer) -> Compared:
    """Compare a number with a time or a residue that may leave out what it is."""
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
    return _same_equation(Equation("=", sympy.Symbol(value.name) - value.expression), equation)


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
    # The base may have been in the question; or the digits be those of ten.
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
    # A ratio can be cancelled down, a time cannot.
    return None if found.may_be_time and wanted.may_be_time else True


def _same_residue(found: Residue, wanted: Residue) -> Compared:
    if found.modulus != wanted.modulus or wanted.modulus == 0:
        return False
    return (found.value - wanted.value) % wanted.modulus == 0


def _equal(found: Answer, wanted: Answer) -> Compared:
    return found == wanted


_RULES: tuple[tuple[type, Callable[[Any, Any], Compared]], ...] = (
    (Value, _same_quantity),
    (Several, _same_several),
    (Interval, _same_interval),
    (Equation, _same_equation),
    (Matrix, _same_matrix),
    (Based, _same_base),
    (Colons, _same_colons),
    (Residue, _same_residue),
    (Time, _equal),
    (Date, _equal),
)
