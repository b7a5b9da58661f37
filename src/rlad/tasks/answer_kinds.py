"""The kinds of answers to mathematical problems: a value with its unit, several values, an
interval, an equation, a time, a text, ..., or a text that cannot be read."""

from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any


@dataclass(frozen=True)
class MeasuredIn:
    """A unit: the quantity that it measures (for an unknown unit, its words), its size, and, for
    units that may be left out (percent, degrees), the value of 1 of it."""

    kind: tuple[str, ...]
    size: Any = None
    scale: Any = None


@dataclass(frozen=True)
class Value:
    expression: Any
    unit: MeasuredIn | None = None
    name: str = ""
    num_digits: int = 0
    """significant digits of a decimal; 0 if it is not a decimal"""
    last_place: Any = 0
    product: Any = None
    """the value if the letters of its unit are variables instead"""
    is_grouped: bool = False
    """whether it has commas between thousands"""

    def unnamed(self) -> "Value":
        return replace(self, name="")


@dataclass(frozen=True)
class Text:
    words: str
    written: str
    product: Any = None
    """the value if its letters are variables"""


@dataclass(frozen=True)
class Several:
    """Several answers: a `list` (no brackets), a `tuple` (with brackets) or a `set`."""

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
    """The statement that `expression` is 0; for < and \\le that it is below (or equal to) 0, for
    \\ne that it is not 0."""

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
    """A text that cannot be read, or that states something false (`is_false`), such as 7 = 42, or
    says what the answer is not (`is_denied`)."""

    written: str
    is_false: bool = field(default=False, compare=False)
    is_denied: bool = field(default=False, compare=False)


Answer = (
    Value | Text | Several | Interval | Equation | Matrix | Based | Residue | Time | Date | Colons
    | NotRead
)  # fmt: skip


def as_interval(pair: Several) -> Interval:
    left, right = pair.items
    return Interval(left, right, pair.brackets[0] != "[", pair.brackets[1] != "]")
