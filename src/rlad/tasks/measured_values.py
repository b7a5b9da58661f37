r"""Values with units: `3 \text{ cm}`, `$5`, `10%`, `1 hour 30 minutes`, `18 eggs`."""

import re
from dataclasses import replace
from fractions import Fraction
from typing import Any

import sympy
from sympy import Rational

from rlad.tasks.answer_kinds import MeasuredIn, Several, Value
from rlad.tasks.formulas import Unreadable, product_of, read_formula
from rlad.tasks.surroundings import (
    CHANGING_WORDS,
    HOW_OFTEN,
    changes_before,
    gives_another_words,
)
from rlad.tasks.units import MULTIPLIERS, UNITS, known_unit

_NO_UNITS = CHANGING_WORDS | {"below", "above", "negative", "least", "most"}
GROUPED = re.compile(
    r"(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9]|,[0-9])"
    r"|(?<![0-9.,])[0-9]{1,2}(?:,[0-9]{2})+,[0-9]{3}(?![0-9]|,[0-9])"
)
_DECIMAL = re.compile(
    r"^[-+]?\s*([0-9]*\.[0-9]+)(?:\s*(?:\\times|\\cdot|[x*])\s*10\s*\^\s*\{?\s*([-+]?[0-9]+)\s*\}?"
    r"|[eE]([-+]?[0-9]+))?$"
)
_SCIENTIFIC = re.compile(
    r"(?<![A-Za-z0-9.\\])([0-9]++(?:\.[0-9]*+)?|\.[0-9]++)[eE]([-+]?[0-9]+)(?![A-Za-z0-9.])"
)
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


def plain_text(text: str) -> str:
    return " ".join(text.replace("\x02", " ").replace("\x03", " ").split()).rstrip(".,;")


def read_value(text: str) -> Any:
    """Read a formula with its unit. With \\pm it has two values."""
    text = text.strip()
    if ordinal := _ORDINAL.match(plain_text(text)):
        return _number(ordinal[1])
    if len(re.findall(r"\\[pm][pm](?![A-Za-z])", text)) == 1:
        both = [re.sub(r"\\(?:pm|mp)(?![A-Za-z])", sign, text) for sign in "+-"]
        return Several("list", tuple(read_value(one) for one in both))
    return _set_unit(text) or _signed_unit(plain_text(_SET_IN_FORMULA.sub(_formula_part, text)))


def _set_unit(text: str) -> Value | None:
    """Read a unit that LaTeX sets as text."""
    found = _SET_TEXT.match(text)
    if not found or not found["value"].strip():
        return None
    unit = plain_text(f"{found['unit'].strip()}{found['power'] or ''} {found['more']}").strip()
    is_in_formula = _IN_FORMULA.match(unit) and not re.match(r"[A-Z]$", unit)
    if not unit or is_in_formula or re.search(r"(?<![\^{-])[0-9]", unit):
        return None
    _require_no_statement(unit)
    return _with_unit(found["value"], unit)


def _signed_unit(bare: str) -> Value:
    """Read a value whose unit is a sign or is typed, or that has none."""
    if _COMPOUND.match(bare):
        return _compound(bare)
    if money := _MONEY.match(bare):
        name = _CURRENCIES[money["currency"]]
        amount, per, other = re.split(r"(\s*/\s*(?=[A-Za-z])|\s+per\s+|$)", money["rest"])[:3]
        value = read_value(money["sign"] + _IDLE_END.sub("", amount))
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
    """Convert text within a formula: the e of \\mathrm{e}, but not words."""
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
    """Read the words after a number as its unit; None if they are variables."""
    first = re.split(r"[\s/^.,-]", unit, maxsplit=1)[0]
    if re.match(r"[eE][-+]?[0-9]", unit):
        return None
    is_known = known_unit(unit) is not None or known_unit(first) is not None
    is_word = len(first) > 3 or (is_apart and len(first) == 3) or len(unit.split()) > 1
    if first.lower() in ("sin", "cos", "tan", "log", "ln", "exp", "sqrt", "pi", "mod", "base"):
        return None
    is_power = is_known and unit.lower().split()[-1] in ("squared", "cubed")
    if _NO_UNITS & set(HOW_OFTEN.sub("", unit).lower().split()) and not is_power:
        raise Unreadable(unit)
    _require_no_statement(unit)
    if first.lower() in ("a", "p", "am", "pm", "and", "or", "r", "to", "plus", "minus"):
        raise Unreadable(unit)
    if not (is_known or is_word or first.lower() in MULTIPLIERS):
        return None
    if re.search(r"(?<![\^{-])[0-9]", unit):
        raise Unreadable(unit)
    if len(unit) == 1:
        # 5 m is five metres or a product.
        found = _with_unit(value, unit)
        return replace(found, product=product_of(f"{value} {unit}"))
    if not is_known and first.lower() not in MULTIPLIERS and not is_apart:
        raise Unreadable(unit)
    return _with_unit(value, unit)


def _require_no_statement(unit: str) -> None:
    """Refuse words after a number that are more than its unit: squared, rejected, or six."""
    is_power = unit.lower().split()[-1:] in (["squared"], ["cubed"]) and len(unit.split()) > 1
    if (changes_before(unit) and not is_power) or gives_another_words(unit):
        raise Unreadable(unit)


def _with_unit(value: str, unit: str) -> Value:
    words = unit.split()
    factor = Rational(1)
    while words and words[0].lower().rstrip("s") in MULTIPLIERS:
        factor *= MULTIPLIERS[words.pop(0).lower().rstrip("s")]
    money = _MONEY.match(plain_text(value))
    number = read_value(value) if money or "\x02" in value else _number(plain_text(value))
    if not isinstance(number, Value):
        raise Unreadable(value)
    if factor != 1:
        number = replace(number, expression=number.expression * factor, num_digits=0)
    rest = " ".join(words)
    if number.unit is not None and rest:
        if known_unit(rest) != UNITS["$"]:
            raise Unreadable(value)
        return number
    return replace(number, unit=number.unit or (_measured_in(rest) if rest else None))


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
    # Speeds also have their own names, such as mph.
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
    """Read a formula without a unit."""
    text = text.strip()
    has_commas = bool(GROUPED.fullmatch(text.lstrip("-+ ")))
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
