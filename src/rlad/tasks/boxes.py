r"""The answer in a `\boxed{...}`, together with text around the box that changes the answer:
`-\boxed{5}`, `2\boxed{5}`, `\boxed{5} million`, `6 or \boxed{5}`."""

import re

from rlad.tasks.denials import is_refused_after, is_refused_before, is_taken_back
from rlad.tasks.restatements import (
    ends_with_value,
    gives_another,
    is_restated_after,
    is_restated_before,
    same_number,
)
from rlad.tasks.units import LARGE_NUMBERS, MULTIPLIERS

_MAX_CHARACTERS_AROUND = 300
_LOOSE_BOX = re.compile(r"\\boxed\s+(?:\{|([^\s{}$\\]*[^\s{}$\\.,;]))")
_IDLE_COMMANDS = re.compile(
    r"\\(?:[,;:! ]|(?:displaystyle|textstyle|therefore|q?quad|[lL]arge|LARGE|[hH]uge|bf|rm)"
    r"(?![A-Za-z])|color\s*\{\w+\})|(?<!~)~(?!~)"
)
# The text that belongs to a box begins after the last of these.
_LEFT_END = re.compile(
    r"(?<![<>!\\:/=])=+(?![<>/=])|[-=]+>|&|\\\\|[.!?;]\s|(?<![0-9]\s):[*_]*\s|(?<![0-9\s]):"
    r"|\\(?:approx|simeq|equiv|implies|to|iff|(?:[lL]ong)?[rR]ightarrow)(?![A-Za-z])|\\begin\{\w+\*?\}"
    r"|^\s*(?:[-*+>\N{BULLET}#\N{WHITE HEAVY CHECK MARK}]+|[0-9]+[.)]|\([a-z0-9]\))\s"
    r"|\b(?:answer|result|solution)\s+[-\N{EN DASH}]\s"
    "|[\N{RIGHTWARDS ARROW}\N{RIGHTWARDS DOUBLE ARROW}\N{THEREFORE}\N{ALMOST EQUAL TO}\N{EM DASH}]",
    re.IGNORECASE,
)
_FORMULA_BEGINS = re.compile(r"\$+|\\[(\[]")
_FORMULA_ENDS = re.compile(r"\$|\\[)\]]")
_RIGHT_END = re.compile(r"[.!;](?![0-9])|\N{EM DASH}")
# Groups and commands around a box that only format it.
_SET = re.compile(
    r"(?:\\(?:text\w*|math(?:bf|rm|sf|it)|boldsymbol|underline|fbox|(?:text)?color\s*\{\w+\})\s*"
    r"|(?<![^\s$=]))\{\s*$"
)
_MARKS_BEFORE = re.compile(
    r"(?<!\S)[*_`\"'(}\N{LEFT DOUBLE QUOTATION MARK}\N{EURO SIGN}\N{POUND SIGN}]+$"
)
_WORD_BEFORE = re.compile(r"(?<![\\\w])[^\W\d_]{2,}[\"')*_`,]*\s*$")
# A comma after these clauses comes before the answer; other commas may separate a list.
_CLAUSE_BEFORE = re.compile(
    r"(?:^|[.;:!?]\s)\W*(?:(?:so|and|but|thus|hence|then|therefore),?\s+)?"
    r"(?:(?:since|as|because)\s(?:[^.,;:?!]|[.,](?=[0-9]))+"
    r"|(?:in|by|after|from|on|at|with|using)\s+(?:the\s+)?(?:(?:years?|days?|weeks?|months?|hours?"
    r"|steps?|rounds?|eqs?|equations?|theorem|lemma|part|lines?)\.?\s+[0-9.]+\)?|[0-9]{4}|[0-9.]+\))"
    r"(?:\s+and\s+[0-9.]+\)?)?)\s*,\s+$",
    re.IGNORECASE,
)
_AFTER_COMMA = re.compile(r",[\s$*`]*(?:\\[(\[])?\s*$")
_LIST_BEFORE = re.compile(r"(?:\$|\\\()\s*-?[0-9][0-9.,]*\s*(?:\$|\\\)),\s*$")
_CHOICE = re.compile(r"\(?(?:\\(?:text|math)\w*\s*\{\s*)?\(?[A-J]\)?\s*\}?\)?")
_BEFORE_CHOICE = r"(?:[0-9a-z%]|(?<![A-J])[})\]$])[,;]?"
_APART_IN_FORMULA = re.compile(
    rf"{_BEFORE_CHOICE}(?:\s{{2,}}|\s+\(|\s+(?:\$+|\\[(\[])\s*)$",
)
_APART_IN_PROSE = re.compile(rf"{_BEFORE_CHOICE}(?:\s+|\s+[(*_]+)$")
_MINUS = re.compile("\\s*[-\N{MINUS SIGN}\N{EN DASH}]\\s*")
_OTHER_BEFORE = re.compile(
    r"(\S+?),?\s+or\s+(?:(?:maybe|perhaps|possibly|else|rather)\s+)?$", re.IGNORECASE
)
# If x is even, 5; 4 to 5.
_HANGS_ON = re.compile(
    r"(?:^|[.;:!?]\s)\W*(?:(?:if|unless|assuming|provided|suppose|supposing)\b[^.;:?!]*,"
    r"|-?[0-9.]+\s+to)\s+$",
    re.IGNORECASE,
)
_BOX_BEFORE = re.compile(
    r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}[^\w\\\n]*"
    r"(?:\b(?:or|and|to|vs|versus|maybe|perhaps|possibly|also)\b[^\w\\\n]*)*$"
)
_CHANGING_BEFORE = re.compile(
    r"\b(?:negative|minus|plus|times|over|twice|thrice|double|triple|(?:square|cube)?\s*root"
    r"|(?:half|third|quarter|root|square|cube|opposite|reciprocal|inverse|negative|multiple|factor"
    r"|power|logarithm|twice|double|triple|percent) of|(?:hundred|thousand|million|[a-z]+ty) and"
    r"|between \S+ and|(?:less|more|fewer|greater) than)\s*$",
    re.IGNORECASE,
)
_SET_TEXT = re.compile(r"\\(?:text\w*|mbox|math(?:rm|sf|bf|it))\s*\{([^{}]*)\}")
_IDLE_IN_FORMULA = re.compile(
    r"(?:[\s.,;:})\]]|\\\\|\\?%|\^\s*\{?\s*\\circ\s*\}?|\\(?:blacksquare|square|qed|checkmark)(?![A-Za-z])"
    r"|\\p?mod\s*\{?[0-9]+\}?|\\tag\s*\{[^{}]*\}|\\end\s*\{[^{}]*\}"
    r"|\\(?:text\w*|mbox|math(?:rm|sf|bf|it))\s*\{[^{}]*\}(?:\s*\^\s*\{?[23]\}?)?)*"
)
_ATTACHED = re.compile(
    r"[.:]?[0-9]|[A-Za-z(]|-[0-9A-Za-z]|\s*(?:[\^_+*=>?\N{PLUS-MINUS SIGN}"
    r"\N{MULTIPLICATION SIGN}\N{MIDDLE DOT}\N{DIVISION SIGN}]|<(?!/)|/\s*[0-9(\\]"
    r"|\\(?:times|cdot|div|pm|le|ge|ne|cup|cap|sqrt|frac|pi)(?![A-Za-z]))"
)
_CONTINUED = re.compile(
    r"\s*(?:[,;]\s*\$?-?[0-9]|[-\N{EN DASH}]\s?\$?[0-9]|[,(]?\s*or\b(?! so\b)"
    r"|(?:out of|if|unless|else|otherwise|k)\b|(?:and|to)\s+\$?[0-9]|and an?\b"
    r"|(?:squared|cubed|factorial|choose|recurring|repeating|"
    + "|".join(f"{word}s?" for word in (*MULTIPLIERS, *LARGE_NUMBERS))
    + r")\b|(?:times|plus|minus|over|(?:less|more|fewer|greater) than)\s+\$?(?:[0-9]|[a-z]\b))",
    re.IGNORECASE,
)


def boxed_answer(completion: str) -> str | None:
    r"""Find the text in the braces of the last `\boxed{...}`; None if there is no box, "" if it is
    not closed."""
    _, box, tail = with_braces(completion).rpartition(r"\boxed{")
    return in_braces(tail)[0] if box else None


def with_braces(text: str) -> str:
    r"""Write `\boxed {5}` and `\boxed 5` as `\boxed{5}`."""
    return _LOOSE_BOX.sub(lambda m: f"\\boxed{{{m[1]}}}" if m[1] else r"\boxed{", text)


def in_braces(tail: str) -> tuple[str, str]:
    """Split the text after an open brace at the brace that closes it; "" and "" if none does."""
    # Braces may be nested, as in \boxed{\frac{1}{2}}, so opened and closed ones are counted.
    depth = 1
    for end, character in enumerate(tail):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return tail[:end].strip(), tail[end + 1 :]
    return "", ""


def with_context(found: str, before: str, after: str) -> str:
    r"""Return the content of a box, with text around it that changes the answer. If that text
    cannot be combined into a readable answer, the box itself is part of the result."""
    remarks = after.partition("\n")[2][:_MAX_CHARACTERS_AROUND]
    if is_taken_back(remarks) or gives_another(after, found):
        return ""
    said, left = _before(before[-_MAX_CHARACTERS_AROUND:])
    right = after.partition("\n")[0][:_MAX_CHARACTERS_AROUND]
    box = _BOX_BEFORE.search(said)
    if box and box[1] != found and not same_number(box[1], found):
        return f"{box[1]} or {found}"
    while group := _SET.search(left):
        left = left[: group.start()]
        right = right.lstrip().removeprefix("}")
    is_in_formula = _is_in_formula(before, right)
    words = re.sub(r"[\s$*_`({}]+|\\[(\[]|\\text\w*", " ", said)
    is_clause_before = _AFTER_COMMA.search(said) and _CLAUSE_BEFORE.search(words)
    is_apart = is_clause_before or _is_choice_apart(left, found, is_in_formula)
    sign = "" if is_apart else _sign_before(left, found)
    if sign is None:
        return f"{left}\\boxed{{{found}}}{right}"
    if is_refused_before(words) or is_refused_after(right):
        return f"not {found}"
    other = _OTHER_BEFORE.search(words)
    if other and not is_restated_before(said, found, right):
        return f"{other[1]} or {found}"
    if _HANGS_ON.search(words):
        return f"if {found}"
    if changing := _CHANGING_BEFORE.search(words):
        return f"{changing[0].strip()} {found}"
    more = "" if is_restated_after(right, found) else _continuation(right, is_in_formula)
    # (1/2)^2 is not 1/2^2.
    return f"{sign}({found}){more}" if more.startswith("^") else f"{sign}{found}{more}"


def _before(text: str) -> tuple[str, str]:
    """Find the sentence before a box, and its part on the same line and the same side of an
    equation."""
    start, _, line = text.rpartition("\n")
    start = start.rstrip(" \t")
    if start.endswith(("$$", r"\[")):
        line = f"$ {line}"  # a dash is a minus there, not the mark of a list item
    line = re.sub(r"\\q?quad(?![A-Za-z])", "  ", line.replace("\\$", " "))
    line = _IDLE_COMMANDS.sub(" ", line)
    said = line if line.strip(" $*_`") else f"{start.rpartition(chr(10))[2]}\n{line}"
    ends = [match.end() for match in _LEFT_END.finditer(line)]
    return said, line[ends[-1] :] if ends else line


def _is_in_formula(before: str, right: str) -> bool:
    """Return whether a box is within a formula. A dollar sign of a price does not count."""
    text = before[-_MAX_CHARACTERS_AROUND:].replace("$$", "$").replace("\\$", "")
    line = text.rpartition("\n")[2]
    is_open = any(line.rfind(f"\\{a}") > line.rfind(f"\\{b}") for a, b in ("()", "[]"))
    return is_open or (line.count("$") % 2 == 1 and "$" in right)


def _is_choice_apart(left: str, found: str, is_in_formula: bool) -> bool:
    r"""Return whether a box holds the letter of a choice that is separate from a value before it,
    as in `5, \boxed{B}`."""
    apart = _APART_IN_FORMULA if is_in_formula else _APART_IN_PROSE
    return _CHOICE.fullmatch(found) is not None and apart.search(left) is not None


def _sign_before(left: str, found: str) -> str | None:
    """Return "" if a box is separate from the text before it, "-" after a minus, otherwise None."""
    if ends_with_value(left, found):
        return ""
    begins = list(_FORMULA_BEGINS.finditer(left))
    inside = left[begins[-1].end() :] if begins else left
    outside = left[: begins[-1].start()] if begins else ""
    if begins and not inside.strip():
        if _LIST_BEFORE.search(outside):
            return None
        inside = outside if not outside[-1:].isspace() or outside.strip()[-1:] in "+-*/^<>" else ""
    bare = _MARKS_BEFORE.sub("", inside.rstrip())
    if _MINUS.fullmatch(bare):
        return "-"
    is_apart = not bare.strip() or _WORD_BEFORE.search(bare) or bare.endswith(f" {found}")
    return "" if is_apart else None


def _continuation(right: str, is_in_formula: bool) -> str:
    """Return the text after a box that belongs to it: `^2`, `\\times 10^3`, ` million`, ` or 6`."""
    right = _IDLE_COMMANDS.sub(" ", right)
    said = _SET_TEXT.sub(r" \1 ", right)
    if _CONTINUED.match(said.lstrip(" $)]*_`\"'\\")):
        return _RIGHT_END.split(said)[0]
    formula, *_ = _FORMULA_ENDS.split(right)
    formula, *_ = re.split(r"\\(?:approx|iff|implies)(?![A-Za-z])", formula)
    if is_in_formula:
        return "" if _IDLE_IN_FORMULA.fullmatch(formula) else formula
    prose = _RIGHT_END.split(right)[0]
    is_attached = _ATTACHED.match(re.sub(r"^[*_`]+(?!\w)", "", prose))
    return prose if is_attached else ""
