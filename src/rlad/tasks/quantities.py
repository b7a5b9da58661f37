"""Compare two values with their units and names: exactly, or, with variables, to 100 digits at
several points. If this is not conclusive, math-verify decides."""

from typing import Any

import sympy
from sympy import Rational

from rlad.tasks.answer_kinds import Equation, Value
from rlad.tasks.formulas import LOG_BASE

POINTS = tuple(
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
LONG_NAME = 4
_NUM_EQUAL_RATIOS = 2


Compared = bool | None
"""Whether two answers are equal; None if this cannot be decided"""


def same_value(a: Any, b: Any) -> Compared:
    """Return whether two expressions have the same value, for all values of their variables."""
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
    if len(symbols) > len(POINTS[0]):
        return None
    num_equal = 0
    for point in POINTS if symbols else ((),):
        at = dict(zip(symbols, point, strict=False))
        is_equal = same_number(a.subs(at), b.subs(at))
        if is_equal is False:
            return False
        num_equal += is_equal is True
    enough = 3 if symbols else 1
    return True if num_equal >= enough else _by_math_verify(a, b)


def same_equation(found: Equation, wanted: Equation) -> Compared:
    """Return whether one equation is a multiple of the other."""
    if found.sign != wanted.sign:
        return False
    a: Any = found.expression
    b: Any = wanted.expression
    if a.is_zero or b.is_zero:
        return None if a.is_zero and b.is_zero else False  # x = x says nothing
    symbols = sorted(a.free_symbols | b.free_symbols, key=str)
    if not symbols or len(symbols) > len(POINTS[0]):
        return None if symbols else False
    pairs = []
    for point in POINTS:
        at = dict(zip(symbols, point, strict=False))
        pairs.append((a.subs(at), b.subs(at)))
    (p, q), *others = pairs
    results = [same_number(p * s, q * r) for r, s in others]
    if False in results:
        return False
    if results.count(True) < _NUM_EQUAL_RATIOS or same_number(p, sympy.Integer(0)) is not False:
        return None
    if found.sign in ("=", r"\ne"):
        return True
    ratio = complex_value(p / q)
    return bool(ratio > 0) if ratio.is_real else None


def same_number(a: Any, b: Any) -> Compared:
    """Compare two numbers to 100 digits of the larger one; None if one is undefined."""
    try:
        sizes = [abs(complex_value(x)) for x in (a, b)]
        difference = abs(complex_value(a - b))
    except (TypeError, ValueError, ArithmeticError):
        return None
    return bool(difference <= max(sizes) * sympy.Float("1e-100", 30))


def complex_value(expression: Any) -> Any:
    """Evaluate a number. Raises `ValueError` if it has no finite value."""
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

    # It also returns False for what it cannot simplify.
    return True if verify(a, b, timeout_seconds=None) else None


def same_quantity(found: Value, wanted: Value) -> Compared:
    if found.name and wanted.name and found.name != wanted.name:
        is_equal = same_quantity(found.unnamed(), wanted.unnamed())
        if is_equal is not True:
            return is_equal
        if len(found.name) == len(wanted.name) == 1:
            return False
        # A = 25 may be the same as "area: 25", and y the same as f(x).
        short, long = sorted((found.name, wanted.name), key=len)
        return True if len(short) < 3 and len(long) >= LONG_NAME and long.isalpha() else None
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
    # 18 chicken eggs are 18 eggs; whether 18 apples are cannot be decided.
    is_part = not (found.unit.size or wanted.unit.size) and (a <= b or b <= a)
    return True if is_part else None


def _without_unit(found: Value, wanted: Value) -> Compared:
    """Compare two values of which one has no unit: 18 eggs equal 18; 10% equals 10 and .1."""
    is_equal = _close(found, wanted)
    if is_equal:
        # 5m may be five metres or a product.
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
    """Compare numbers. A decimal with six digits or more may be a rounded number that has no finite
    decimal form."""
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
    """Return whether a number has a finite decimal form."""
    if not number.is_Rational:
        return False
    rest = int(number.q)
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return rest == 1
