# ruff: noqa: C901, PLR0915, E501, E731, RUF005
"""Answers in random forms, with what they are by construction: `(text, truth)`.

Two answers are equal exactly when their truths are equal. Truths are fractions, tuples and words,
made before the text and from no parser.
"""

from fractions import Fraction
from math import isqrt
from typing import Any

from hypothesis import strategies as st

Truth = tuple[Any, ...]

_UNITS = {
    "time": {Fraction(1): ["s", "seconds"], Fraction(60): ["min", "minutes"],
             Fraction(3600): ["hours", "hrs", "h"], Fraction(86400): ["days"]},
    "length": {Fraction(1): ["m", "meters"], Fraction(1000): ["km", "kilometers"],
               Fraction(1, 100): ["cm"], Fraction(1609344, 1000): ["miles"]},
    "mass": {Fraction(1): ["grams", "g"], Fraction(1000): ["kg", "kilograms"]},
    "money": {Fraction(1): ["dollars", "USD"], Fraction(1, 100): ["cents"]},
    "things": {Fraction(1): ["eggs", "egg"]}, "people": {Fraction(1): ["people", "persons"]},
}  # fmt: skip
_MINUS = "\N{MINUS SIGN}"
_DIGITS = "0123456789ABCDEF"


def _decimal(value: Fraction) -> str | None:
    """Write a fraction as a decimal with an end, if it has one."""
    for places in range(12):
        scaled = value * 10**places
        if scaled.denominator == 1:
            digits = str(abs(int(scaled))).rjust(places + 1, "0")
            sign = "-" if value < 0 else ""
            whole, tail = (digits[:-places], digits[-places:]) if places else (digits, "")
            return sign + whole + ("." + tail if tail else "")
    return None


def _repeating(value: Fraction) -> str | None:
    """Write a positive fraction below 1 with a repeating tail, `0.1\\overline{6}`."""
    if not 0 < value < 1:
        return None
    seen: dict[int, int] = {}
    digits = ""
    rest = value.numerator
    while rest and rest not in seen and len(digits) < 12:
        seen[rest] = len(digits)
        rest *= 10
        digits += str(rest // value.denominator)
        rest %= value.denominator
    if not rest or rest not in seen:
        return None
    return f"0.{digits[: seen[rest]]}\\overline{{{digits[seen[rest] :]}}}"


def number_forms(value: Fraction) -> list[str]:
    """All ways to write a number that are tried."""
    a, b = abs(value.numerator), value.denominator
    sign = "-" if value < 0 else ""
    forms = [
        f"{sign}{a}/{b}",
        f"{sign}\\frac{{{a}}}{{{b}}}",
        f"{sign}\\dfrac{{{2 * a}}}{{{2 * b}}}",
    ]
    if b == 1:
        forms = [f"{sign}{a}", f"{sign}{a}.0", f"{sign}{a:,}", f"{sign}{a:,}".replace(",", "{,}"),
                 f"{sign}{a:,}".replace(",", "\\,"), f"{sign}\\frac{{{3 * a}}}{{3}}",
                 f"{sign and _MINUS}{a}"]  # fmt: skip
    elif a > b:
        whole, part = divmod(a, b)
        forms += [f"{sign}{whole} {part}/{b}", f"{sign}{whole}\\frac{{{part}}}{{{b}}}"]
    if (decimal := _decimal(value)) is not None:
        forms += [decimal, f"{decimal}0" if "." in decimal else decimal]
        for power in (-3, 4):
            shifted = _decimal(value / Fraction(10) ** power)
            if shifted is not None:
                forms += [f"{shifted}e{power}", f"{shifted} \\times 10^{{{power}}}",
                          f"{shifted} x 10^{power}"]  # fmt: skip
    if (repeating := _repeating(value)) is not None:
        forms.append(repeating)
    return forms


numbers = st.one_of(
    st.integers(-30, 30).map(Fraction),
    st.integers(-(10**7), 10**7).map(Fraction),
    st.fractions(-20, 20, max_denominator=30),
    st.integers(-(10**6), 10**6).map(lambda n: Fraction(n, 1000)),
    st.tuples(st.integers(1, 99), st.integers(-30, -5)).map(
        lambda t: Fraction(t[0]) * Fraction(10) ** t[1]
    ),
)


def _small(value: Fraction) -> list[str]:
    """Powers of ten alone for what has too many places otherwise."""
    a, power = value, 0
    while a.denominator > 1:
        a, power = a * 10, power - 1
    return [f"{a}e{power}", f"{a} \\times 10^{{{power}}}", f"\\frac{{{a}}}{{10^{{{-power}}}}}"]


def _square_free(n: int) -> bool:
    return n > 1 and all(n % (d * d) for d in range(2, isqrt(n) + 1))


def _signed(terms: list[str]) -> str:
    return "+".join(terms).replace("+-", "-")


@st.composite
def written(draw: st.DrawFn, truth: Truth) -> str:
    """A text that says `truth`."""
    kind, *rest = truth
    pick: Any = lambda options: draw(st.sampled_from(options))
    number: Any = lambda value: pick(
        _small(value) if value.denominator > 10**9 else number_forms(value)
    )
    match kind:
        case "number":
            return number(rest[0])
        case "surd":  # a + b sqrt(c)
            a, b, c = rest
            root = pick([f"{b}\\sqrt{{{c}}}", f"{b}\\sqrt({c})", f"{b} \\cdot \\sqrt{{{c}}}",
                         f"{'-' if b < 0 else ''}\\sqrt{{{b * b * c}}}", f"{b}\\sqrt{{{c}}}"])  # fmt: skip
            terms = [str(a), root] if a else [root]
            return _signed(terms[:: pick([1, -1])])
        case "pi":
            a, b = rest
            return pick([f"\\frac{{{a}\\pi}}{{{b}}}", f"\\frac{{{a}}}{{{b}}}\\pi", f"{a}\\pi/{b}"])
        case "complex":
            a, b = rest
            return _signed([str(a), f"{b}i"][:: pick([1, -1])])
        case "line":  # a x + b
            a, b = rest
            return pick([_signed([f"{a}x", str(b)]), _signed([str(b), f"{a}x"]),
                         _signed([f"{a}(x+1)", str(b - a)]), f"y = {_signed([f'{a}x', str(b)])}"])  # fmt: skip
        case "square":  # (x + a)(x + b)
            a, b = sorted(rest)
            return pick([f"(x{a:+})(x{b:+})", f"(x{b:+})(x{a:+})", f"x^2{a + b:+}x{a * b:+}",
                         f"{a * b}{a + b:+}x+x^{{2}}"])  # fmt: skip
        case "measured":
            dimension, amount = rest
            size, names = pick(list(_UNITS[dimension].items()))
            unit = pick(names)
            value = amount / size
            written_value = pick(number_forms(value)[:4])
            form = pick([" {}", "\\text{{ {}}}", " \\mathrm{{{}}}", " \\text{{{}}}"])
            return f"{written_value}{form.format(unit)}"
        case "based":
            value, base = rest
            digits = ""
            while value:
                digits, value = _DIGITS[value % base] + digits, value // base
            return pick([f"{digits}_{{{base}}}", f"{digits}_{base}" if base < 10 else
                         f"{digits}_{{{base}}}", f"({digits})_{{{base}}}"])  # fmt: skip
        case "time":
            (minutes,) = rest
            hour, minute = divmod(minutes, 60)
            half = "a.m." if hour < 12 else "p.m."
            tail = f"{pick([half, half.replace('.', '').upper(), half.replace('.', '')])}"
            head = f"{(hour - 1) % 12 + 1}"
            colon = f":{minute:02}" if minute or pick([True, False]) else ""
            return f"{head}{colon}" + pick([f" {tail}", f" \\text{{ {tail}}}"])
        case "clock":
            return f"{rest[0] // 60}:{rest[0] % 60:02}"
        case "residue":
            residue, modulus = rest
            value = residue + modulus * draw(st.integers(-1, 2))
            return pick([f"x \\equiv {value} \\pmod {{{modulus}}}", f"{value} \\pmod{{{modulus}}}",
                         f"{value} (mod {modulus})"])  # fmt: skip
        case "bounded":
            sign, bound = rest
            text = number(bound)
            flipped = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le"}[sign]
            is_less, is_open = sign in ("<", "\\le"), sign in ("<", ">")
            left, right = (
                "(" if is_open or is_less else "[",
                ")" if is_open or not is_less else "]",
            )
            inner = f"-\\infty, {text}" if is_less else f"{text}, \\infty"
            return pick([f"x {sign} {text}", f"{text} {flipped} x", f"{left}{inner}{right}",
                         f"{sign} {text}"])  # fmt: skip
        case "between":
            a, b, is_left_open, is_right_open = rest
            left, right = ("<" if is_left_open else "\\le"), ("<" if is_right_open else "\\le")
            return pick([f"{number(a)} {left} x {right} {number(b)}"] + (
                [f"x \\in {'(' if is_left_open else '['}{a}, {b}{')' if is_right_open else ']'}"]
            ))  # fmt: skip
        case "point":
            inner = ", ".join(number_forms(v)[0] for v in rest)
            return pick([f"({inner})", f"\\left({inner}\\right)"])
        case "set":
            items = draw(st.permutations(sorted(rest[0])))
            inner = ", ".join(number_forms(v)[0] for v in items)
            words = pick([" and ", " or ", "\\text{ and }"]).join(
                f"x = {number_forms(v)[0]}" for v in items
            )
            return pick([f"\\{{{inner}\\}}", f"\\{{{inner}, {number_forms(items[0])[0]}\\}}",
                         inner if len(items) > 1 else f"x = {inner}", words])  # fmt: skip
        case "matrix":
            rows = " \\\\ ".join(" & ".join(map(str, row)) for row in rest[0])
            name = pick(["pmatrix", "bmatrix"])
            return f"\\begin{{{name}}} {rows} \\end{{{name}}}"
        case "word":
            word = rest[0]
            return pick([word, f"\\text{{{word}}}", word.capitalize(), f"{word}.", word.upper()])
    raise AssertionError(kind)


_ints = st.integers(-12, 12)
_nonzero = _ints.filter(bool)
truths: st.SearchStrategy[Truth] = st.one_of(
    numbers.map(lambda v: ("number", v)),
    numbers.map(lambda v: ("number", v)),
    st.tuples(st.just("surd"), _ints, _nonzero, st.integers(2, 15).filter(_square_free)),
    st.tuples(_nonzero, st.integers(1, 12)).map(
        lambda t: ("pi", Fraction(*t).numerator, Fraction(*t).denominator)
    ),
    st.tuples(st.just("complex"), _nonzero, _nonzero),
    st.tuples(st.just("line"), _nonzero, _ints),
    st.tuples(_ints, _ints).map(lambda t: ("square", *sorted(t))),
    st.tuples(st.just("measured"), st.sampled_from(sorted(_UNITS)), st.integers(1, 40).map(Fraction)),
    st.tuples(st.just("based"), st.integers(4, 60), st.sampled_from([2, 3, 5, 8, 16])),
    st.tuples(st.just("time"), st.integers(0, 1439)),
    st.tuples(st.just("clock"), st.integers(0, 1439)),
    st.integers(2, 12).flatmap(
        lambda m: st.tuples(st.just("residue"), st.integers(0, m - 1), st.just(m))
    ),
    st.tuples(st.just("bounded"), st.sampled_from(["<", ">", "\\le", "\\ge"]), _ints.map(Fraction)),
    st.tuples(_ints, st.integers(1, 9), st.booleans(), st.booleans()).map(
        lambda t: ("between", Fraction(t[0]), Fraction(t[0] + t[1]), t[2], t[3])
    ),
    st.lists(_ints.map(Fraction), min_size=2, max_size=4).map(lambda v: ("point", *v)),
    st.sets(_ints.map(Fraction), min_size=1, max_size=4).map(lambda v: ("set", frozenset(v))),
    st.lists(st.tuples(_ints, _ints), min_size=1, max_size=3).map(lambda v: ("matrix", tuple(v))),
    st.sampled_from(["listen", "silent", "enlist", "evelyn", "paris", "pairs", "monday", "even",
                     "abcd", "dcba", "bdca"]).map(lambda word: ("word", word)),
)  # fmt: skip


def same_truth(one: Truth, other: Truth) -> bool | None:
    """Whether two truths are equal; None where that depends on the question: a unit that one does
    not say, a base, a point that may be an interval."""
    if one == other:
        return True
    kinds = {one[0], other[0]}
    for a, b in ((one, other), (other, one)):
        if a[0] == "set" and len(a[1]) == 1 and b[0] == "number":
            return b[1] in a[1]
        if (a[0] == "pi" and b[0] == "number") or (a[0] == "surd" and b[0] == "number"):
            return False
    unclear = (
        {"number", "measured"}, {"number", "based"}, {"based"}, {"number", "time"}, {"set", "point"},
        {"number", "residue"}, {"time", "clock"}, {"clock"}, {"between", "point"}, {"set", "measured"},
        {"set", "based"}, {"measured", "based"}, {"set", "residue"}, {"between", "set"},
    )  # fmt: skip
    if kinds in unclear and not (kinds == {"based"} and one[1] != other[1]):
        return None if kinds != {"clock"} or one[1] != other[1] else True
    return False


@st.composite
def pairs(draw: st.DrawFn) -> tuple[str, str, bool | None]:
    """Two written answers, often of one truth or of two that are nearly the same; and whether they
    are equal."""
    one = draw(truths)
    how = draw(st.integers(0, 3))
    other = one
    if how == 1:
        other = draw(truths)
    elif how > 1:
        other = draw(truths.filter(lambda t: t[0] == one[0]))
        if one[0] not in ("word", "set", "matrix", "residue") and len(other) == len(one):
            # All but one part is that of the first.
            at = draw(st.integers(1, len(one) - 1))
            mixed = (*one[:at], other[at], *one[at + 1 :])
            other = mixed if one[0] != "square" else ("square", *sorted(mixed[1:]))
            if one[0] == "pi":
                value = Fraction(mixed[1], mixed[2])
                other = ("pi", value.numerator, value.denominator)
            if one[0] == "between" and mixed[1] >= mixed[2]:
                other = one
    return draw(written(one)), draw(written(other)), same_truth(one, other)
