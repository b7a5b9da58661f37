"""One notation for the variants of different scripts, keyboards and LaTeX."""

import re
import unicodedata


def words(text: str) -> list[str]:
    """Split a table that is written as a text into its words."""
    return text.split()


_SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱ", "0123456789+-()ni", strict=True))
_SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋₍₎", "0123456789+-()", strict=True))
_SIGNS = {
    "\N{MINUS SIGN}": "-",
    "\N{SMALL HYPHEN-MINUS}": "-",
    "\N{HYPHEN}": "-",
    "\N{NON-BREAKING HYPHEN}": "-",
    "\N{MULTIPLICATION SIGN}": r"\times ",
    "\N{DIVISION SIGN}": r"\div ",
    "\N{MIDDLE DOT}": r"\cdot ",
    "\N{DOT OPERATOR}": r"\cdot ",
    "\N{BULLET OPERATOR}": r"\cdot ",
    "\N{ASTERISK OPERATOR}": "*",
    "\N{DIVISION SLASH}": "/",
    "\N{FRACTION SLASH}": "/",
    "\N{SQUARE ROOT}": r"\sqrt ",
    "\N{INFINITY}": r"\infty ",
    "\N{LESS-THAN OR EQUAL TO}": r"\le ",
    "\N{LESS-THAN OR SLANTED EQUAL TO}": r"\le ",
    "\N{GREATER-THAN OR EQUAL TO}": r"\ge ",
    "\N{GREATER-THAN OR SLANTED EQUAL TO}": r"\ge ",
    "\N{NOT EQUAL TO}": r"\ne ",
    "\N{ALMOST EQUAL TO}": r"\approx ",
    "\N{IDENTICAL TO}": r"\equiv ",
    "\N{PLUS-MINUS SIGN}": r"\pm ",
    "\N{MINUS-OR-PLUS SIGN}": r"\mp ",
    "\N{UNION}": r"\cup ",
    "\N{INTERSECTION}": r"\cap ",
    "\N{ELEMENT OF}": r"\in ",
    "\N{EMPTY SET}": r"\emptyset ",
    "\N{DEGREE SIGN}": r"^\circ ",
    "\N{ARABIC DECIMAL SEPARATOR}": ".",
    "\N{ARABIC THOUSANDS SEPARATOR}": ",",
    "\N{ARABIC PERCENT SIGN}": "%",
    "\N{IDEOGRAPHIC COMMA}": ",",
    "\N{IDEOGRAPHIC FULL STOP}": ".",
    "\N{RIGHT SINGLE QUOTATION MARK}": "'",
    "\N{LEFT SINGLE QUOTATION MARK}": "'",
    "\N{PRIME}": "'",
    "\N{ZERO WIDTH SPACE}": "",
    "\N{WORD JOINER}": "",
    "\N{ZERO WIDTH NO-BREAK SPACE}": "",
    "\N{THIN SPACE}": r"\,",
    "\N{NARROW NO-BREAK SPACE}": r"\,",
    "\N{NO-BREAK SPACE}": r"\,",
    "\N{FIGURE SPACE}": r"\,",
    "\N{CHECK MARK}": "",
    "\N{HEAVY CHECK MARK}": "",
    "\N{WHITE HEAVY CHECK MARK}": "",
    "\N{VARIATION SELECTOR-16}": "",
} | {
    letter: f"\\{name} "
    for letter, name in zip(
        "αβγδεζηθικλμνξπρστφχψωΓΔΘΛΞΠΣΦΨΩ",
        words(
            "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi pi rho "
            "sigma tau phi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega"
        ),
        strict=True,
    )
}
_WRAPPED = re.compile(
    r"\\(?:text|textbf|textit|textrm|textsf|texttt|textnormal|mathrm|mathbf|mathit|mathsf|mathtt"
    r"|operatorname|mbox|hbox|emph|bf|rm)\s*\{([^{}\\]*)\}"
)
_SUPERSCRIPT = re.compile(f"[{''.join(_SUPERSCRIPTS)}]+")
_SUBSCRIPT = re.compile(f"[{''.join(_SUBSCRIPTS)}]+")
_NOT_ASCII = re.compile(r"[^\x00-\x7f]")
_REPLACED = [
    (re.compile(pattern), by)
    for pattern, by in (
        (r"\\(?:left|right|[bB]igg?[lrm]?)(?![A-Za-z])\s*\.?", ""),
        (r"\\(?:displaystyle|textstyle|limits|nolimits|rm|bf|it|mathstrut)(?![A-Za-z])", ""),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\leqslant(?![A-Za-z])|\\leq(?![A-Za-z])", r"\\le"),
        (r"\\geqslant(?![A-Za-z])|\\geq(?![A-Za-z])", r"\\ge"),
        (r"\\neq(?![A-Za-z])|=/=|=\\=|/=(?!=)|<>", r"\\ne "),
        (r"\\varnothing(?![A-Za-z])", r"\\emptyset"),
        (r"\\[lr]vert(?![A-Za-z])|\\[lr]?Vert(?![A-Za-z])", "|"),
        (r"\\lbrace(?![A-Za-z])", r"\\{"),
        (r"\\rbrace(?![A-Za-z])", r"\\}"),
        (r"\\lbrack(?![A-Za-z])", "["),
        (r"\\rbrack(?![A-Za-z])", "]"),
        (r"\\(?:degree|textdegree)(?![A-Za-z])", r"^\\circ "),
        (r"\^\s*\{\s*\\circ\s*\}", r"^\\circ "),
        (r"\{\s*,\s*\}", "{,}"),
        # Separators of thousands: any space, an apostrophe, {,}.
        (r"(?<=[0-9])(?:(?<!\\)\\[,;:! ]|\{,\}|'|~| )+(?=[0-9]{3}(?![0-9]|\s*/))", "\x01"),
        (r"\{,\}", ","),
        (r"(?<!\\)\\[,;:!> ]|\\q?quad(?![A-Za-z])|~", " "),
        (r"(?<![0-9_])([0-9]{1,3})((?:_[0-9]{3})+)(?![0-9_])", lambda m: m[0].replace("_", "")),
    )
]
_THOUSANDS = re.compile("[0-9]{1,3}(?:\x01[0-9]{3})+")


def _in_ascii(match: re.Match[str]) -> str:
    letter = match[0]
    if unicodedata.category(letter) == "Cf":
        return ""  # invisible direction marks and joiners
    if (sign := _SIGNS.get(letter)) is not None:
        return sign
    digit = unicodedata.decimal(letter, None)
    if digit is not None:
        return str(digit)
    plain = unicodedata.normalize("NFKC", letter)
    above, slash, below = plain.partition("\N{FRACTION SLASH}")
    if slash and above.isascii() and below.isascii():
        return f"\\frac{{{above}}}{{{below}}}"
    return plain if len(plain) == 1 and plain.isascii() else letter


def plain_notation(text: str) -> str:
    """Convert digits, signs and spaces of all scripts, and their LaTeX variants, to one form."""
    text = _SUPERSCRIPT.sub(lambda m: f"^{{{''.join(map(_SUPERSCRIPTS.__getitem__, m[0]))}}}", text)
    text = _SUBSCRIPT.sub(lambda m: f"_{{{''.join(map(_SUBSCRIPTS.__getitem__, m[0]))}}}", text)
    text = _NOT_ASCII.sub(_in_ascii, text)
    for pattern, by in _REPLACED:
        text = pattern.sub(by, text)
    text = _THOUSANDS.sub(lambda m: m[0].replace("\x01", ""), text)
    return text.replace("\x01", " ")


def without_wrapping(text: str) -> str:
    r"""Remove dollars and `\text{...}` that only format a text: `$\text{Oslo}$` is Oslo."""
    text = text.strip()
    if len(text) > 2 and text[0] == text[-1] == "$" and "$" not in text[1:-1]:
        text = text[1:-1].strip()
    return _WRAPPED.sub(r"\1", text)
