"""A parser of formulas, in LaTeX or as typed. A whole text becomes one sympy expression, or it is
refused.

Parsers for pages of text use the part that they understand. This one leaves nothing out and does
not guess: ambiguous texts (`1/2x`), and what its grammar lacks (sums, integrals), are `Unreadable`.
"""

from fractions import Fraction
from typing import Any

import sympy
from sympy import Rational, Symbol

from rlad.tasks.formula_tokens import FUNCTIONS, GREEK, INVERSES, Unreadable, tokens_of

_MAX_EXPONENT = 20_000
_MAX_TOKENS = 400
_MAX_DEPTH = 40

_GROWING = frozenset(["exp", "sinh", "cosh", "tanh", "coth"])
_ACCENTS = frozenset(["bar", "vec", "hat", "tilde", "overline", "dot", "mathbf", "boldsymbol"])
_APPLIED = frozenset("fghFGH")
LOG_BASE = Symbol("base of log", positive=True)
"""The base of `\\log` without a base: 10 or e, by the convention of the author's field"""


def read_formula(text: str) -> Any:
    """Read a whole text as one expression. Raises `Unreadable` if any part is not understood."""
    return _Reader(text).whole()


def product_of(text: str) -> Any:
    """Read letters as a product of variables; None if they are not a formula."""
    try:
        return read_formula(text)
    except Unreadable:
        return None


class _Reader:
    """The recursive descent parser over tokens (kind, text, whether white space comes before)."""

    def __init__(self, text: str) -> None:
        self._tokens = tokens_of(text)
        if not self._tokens or len(self._tokens) > _MAX_TOKENS:
            raise Unreadable(text)
        self._at = 0
        self._depth = 0
        self._has_open_bar = False

    # --- tokens -----------------------------------------------------------------------------------

    def _peek(self) -> tuple[str, str]:
        return self._tokens[self._at][:2] if self._at < len(self._tokens) else ("end", "")

    def _take(self) -> tuple[str, str]:
        token = self._peek()
        self._at += 1
        return token

    def _accept(self, *texts: str) -> str:
        text = self._peek()[1]
        if text in texts and text:
            self._at += 1
            return text
        return ""

    def _expect(self, text: str) -> None:
        if not self._accept(text):
            raise Unreadable(f"{text} is missing")

    # --- grammar ----------------------------------------------------------------------------------

    def whole(self) -> Any:
        result = self._sum()
        if self._peek()[0] != "end":
            raise Unreadable(self._peek()[1])
        return result

    def _sum(self) -> Any:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise Unreadable("too deep")
        total = self._signed()
        while sign := self._accept("+", "-"):
            term = self._signed() if self._peek()[1] not in ("+", "-") else None
            if term is None:
                raise Unreadable("two signs")
            total = total + term if sign == "+" else total - term
        self._depth -= 1
        return total

    def _signed(self) -> Any:
        """Read a product, which may have a sign."""
        sign = self._accept("+", "-")
        product = self._product()
        return -product if sign == "-" else product

    def _product(self) -> Any:
        result = self._power()
        has_slash = False
        while True:
            kind, text = self._peek()
            if self._accept("*", r"\cdot", r"\times"):
                if has_slash and self._peek()[1] in ("+", "-"):
                    raise Unreadable("two signs")
                result = result * self._factor()
            elif self._accept("/", r"\div"):
                divisor = self._factor()
                if divisor == 0:
                    raise Unreadable("division by zero")
                result = result / divisor
                has_slash = True
            elif kind == "number" or (text == r"\frac" and self._follows_number()):
                raise Unreadable("two numbers side by side")
            elif self._begins_factor(kind, text):
                # 1/2x is x/2 for some and 1/(2x) for others.
                if has_slash:
                    raise Unreadable("a product after a slash")
                result = result * self._power()
            else:
                return result

    def _follows_number(self) -> bool:
        return self._at > 0 and self._tokens[self._at - 1][0] == "number"

    def _begins_factor(self, kind: str, text: str) -> bool:
        if kind == "letter" or text in ("(", "{", "["):
            return True
        if text == "|":
            return not self._has_open_bar
        if kind != "command":
            return False
        name = text[1:]
        return (
            name in FUNCTIONS
            or name in GREEK
            or name in _ACCENTS
            or name in ("pi", "frac", "sqrt", "binom", "infty", "lfloor", "lceil")
        )

    def _factor(self) -> Any:
        """Read a factor after an operator. It may have a sign: 5 * -3."""
        if self._accept("-"):
            return -self._power()
        return self._power()

    def _power(self) -> Any:
        base = self._mixed_or_atom()
        while True:
            if self._accept("!"):
                if not (base.is_Integer and 0 <= base <= 10_000) and base.is_number:
                    raise Unreadable("factorial")
                base = sympy.factorial(base)
            elif self._peek()[1] in ("!!", "'"):
                raise Unreadable("double factorial or prime")
            elif self._accept("^", "**"):
                if self._accept(r"\circ"):
                    base = base * sympy.pi / 180
                else:
                    base = _power(base, self._exponent())
                if self._peek()[1] in ("^", "**"):
                    raise Unreadable("two exponents")
            else:
                return base

    def _exponent(self) -> Any:
        if self._accept("{"):
            result = self._sum()
            self._expect("}")
            return result
        sign = self._accept("-", "+")
        atom = self._atom()
        return -atom if sign == "-" else atom

    def _mixed_or_atom(self) -> Any:
        """Read an atom or a mixed number: 3 1/2, 3\\frac{1}{2}."""
        kind, text = self._peek()
        if kind != "number" or "." in text:
            return self._atom()
        start = self._at
        whole = self._atom()
        if self._peek()[1] == r"\frac":
            part = self._atom()
            pieces = self._tokens[start : self._at]
            is_bare = all(kind == "number" or text in r"{}\frac" for kind, text, _ in pieces)
            if not is_bare and not part.is_number:
                return whole * part  # 2\frac{x}{3} is a product
        elif self._peek()[0] == "number":
            is_bare = True
            part = self._typed_fraction()
        else:
            return whole
        if not (is_bare and part.is_Rational and 0 < part < 1):
            raise Unreadable("a number beside a fraction")
        return whole + part

    def _typed_fraction(self) -> Any:
        pieces = [token[:2] for token in self._tokens[self._at : self._at + 3]]
        kinds = [kind if kind == "number" else text for kind, text in pieces]
        if kinds != ["number", "/", "number"] or not pieces[2][1].strip("0."):
            raise Unreadable("two numbers side by side")
        self._at += 3
        return Rational(pieces[0][1]) / Rational(pieces[2][1])

    def _atom(self) -> Any:
        kind, text = self._take()
        if kind == "number":
            return self._number(text)
        if kind == "letter":
            return self._letter(text)
        if text in ("(", "[", "{"):
            inner = self._sum()
            self._expect({"(": ")", "[": "]", "{": "}"}[text])
            return inner
        if text == "|":
            self._has_open_bar = True
            inner = self._sum()
            self._expect("|")
            self._has_open_bar = False
            return sympy.Abs(inner)
        if kind == "command":
            return self._command(text[1:])
        raise Unreadable(text)

    def _number(self, text: str) -> Any:
        value = Rational(text.rstrip("."))
        if self._peek()[1] == r"\overline" and "." in text:
            self._take()
            self._expect("{")
            _, digits = self._take()
            self._expect("}")
            if not digits.isdigit():
                raise Unreadable(digits)
            places = len(text.partition(".")[2])
            value += Rational(int(digits), 10**places * (10 ** len(digits) - 1))
        return value

    def _letter(self, letter: str) -> Any:
        if letter in _APPLIED and self._peek()[1] == "(":
            self._take()
            inner = self._sum()
            self._expect(")")
            return sympy.Function(letter)(inner)
        index = self._index()
        if letter == "e" and not index:
            return sympy.E
        if letter == "i" and not index:
            return sympy.I
        return Symbol(letter + index)

    def _index(self) -> str:
        """Read the index of a variable, as text."""
        if not self._accept("_"):
            return ""
        if not self._accept("{"):
            kind, text = self._take()
            if kind not in ("letter", "number"):
                raise Unreadable("index")
            return f"_{text}"
        found = ""
        while (token := self._take())[1] != "}":
            if token[0] not in ("letter", "number") and token[1] not in ("+", "-", ","):
                raise Unreadable("index")
            found += token[1]
        return f"_{found}"

    def _group(self) -> Any:
        """Read an argument in braces, or one digit or letter."""
        if self._accept("{"):
            inner = self._sum()
            self._expect("}")
            return inner
        kind, text = self._peek()
        if kind == "number" and len(text) > 1:
            # In \frac12 each argument is one digit.
            _, _, is_apart = self._tokens[self._at]
            digits = [("number", digit, is_apart) for digit in text]
            if "." in text:
                raise Unreadable(text)
            self._tokens[self._at : self._at + 1] = digits
        return self._atom()

    def _command(self, name: str) -> Any:
        constants = {"pi": sympy.pi, "infty": sympy.oo}
        if name in constants:
            return constants[name]
        readers = {"frac": self._fraction, "sqrt": self._root, "binom": self._binomial}
        if name in readers:
            return readers[name]()
        if name in ("lfloor", "lceil"):
            inner = self._sum()
            self._expect(r"\rfloor" if name == "lfloor" else r"\rceil")
            return sympy.floor(inner) if name == "lfloor" else sympy.ceiling(inner)
        if name in GREEK:
            return Symbol("\\" + name + self._index())
        if name in _ACCENTS:
            return self._accented(name)
        if name in FUNCTIONS:
            return self._function(name)
        raise Unreadable(name)

    def _fraction(self) -> Any:
        start = self._at
        above = self._group()
        below = self._group()
        pieces = [token[1] for token in self._tokens[start : self._at]]
        if pieces[1:2] == ["d"] and "d" in pieces[2:]:
            raise Unreadable("a derivative")
        if below == 0:
            raise Unreadable("division by zero")
        return above / below

    def _root(self) -> Any:
        degree = sympy.Integer(2)
        if self._accept("["):
            degree = self._sum()
            self._expect("]")
        if degree == 0:
            raise Unreadable("root")
        inside = self._group() if self._peek()[1] == "{" else self._atom()
        return _power(inside, 1 / degree)

    def _binomial(self) -> Any:
        above, below = self._group(), self._group()
        if not all(n.is_Integer and 0 <= n <= 10_000 for n in (above, below)):
            raise Unreadable("binomial")
        return sympy.binomial(above, below)

    def _accented(self, name: str) -> Any:
        """Read \\bar{x} as a variable of its own."""
        self._expect("{")
        kind, text = self._take()
        self._expect("}")
        if kind != "letter" and text[1:] not in GREEK:
            raise Unreadable(text)
        return Symbol(f"\\{name} {text}" + self._index())

    def _function(self, name: str) -> Any:
        base = None
        power = None
        for _ in range(2):
            if name == "log" and self._accept("_"):
                base = self._group_or_number()
            elif self._accept("^"):
                power = self._exponent()
        if power is not None and power == -1:
            if name not in INVERSES:
                raise Unreadable("inverse")
            return INVERSES[name](self._argument())
        argument = self._argument()
        if name == "log":
            value = sympy.log(argument) / sympy.log(LOG_BASE if base is None else base)
        elif name in _GROWING and argument.is_number and bool(abs(argument) > _MAX_EXPONENT):
            raise Unreadable("a power of e")
        else:
            value = FUNCTIONS[name](argument)
        return value if power is None else _power(value, power)

    def _group_or_number(self) -> Any:
        return self._group() if self._peek()[1] == "{" else self._atom()

    def _argument(self) -> Any:
        """Read the argument of a function: brackets, or the factors up to the next operator."""
        if self._peek()[1] in ("(", "{", "["):
            return self._atom_with_power()
        result = self._atom_with_power()
        while self._peek()[0] == "letter" or self._peek()[1][1:] in GREEK | {"pi"}:
            result = result * self._atom_with_power()
        if self._peek()[1] == "/":
            raise Unreadable("a slash in an argument without brackets")
        return result

    def _atom_with_power(self) -> Any:
        has_brackets = self._peek()[1] in ("(", "{", "[")
        atom = self._mixed_or_atom()
        if not self._accept("^"):
            return atom
        if self._accept(r"\circ"):
            return atom * sympy.pi / 180
        if has_brackets:
            # sin(x)^2 is the square of the sine for some and of the argument for others.
            raise Unreadable("a power after an argument in brackets")
        return _power(atom, self._exponent())


def _power(base: Any, exponent: Any) -> Any:
    is_large = exponent.is_number and bool(abs(exponent) > _MAX_EXPONENT)
    if is_large or (base.is_zero and exponent.is_number and not exponent.is_positive):
        raise Unreadable("power")
    if base.is_Rational and exponent.is_Rational:
        size = Fraction(int(base.p), int(base.q))
        digits = max(len(str(size.numerator)), len(str(size.denominator)))
        if digits * abs(exponent) > 10 * _MAX_EXPONENT:
            raise Unreadable("power")
    return base**exponent
