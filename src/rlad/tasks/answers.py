"""The answer in a completion and what it says: pure functions that never raise on any text.

All of them are linear in the length of the text and look at its last `MAX_COMPLETION_CHARACTERS`
only.
"""

import ast
import operator
import re
from collections import deque
from collections.abc import Callable
from fractions import Fraction

MAX_COMPLETION_CHARACTERS = 200_000
_MAX_EXPRESSION_CHARACTERS = 500
_MAX_NUMBER_CHARACTERS = 500

_ANSWER_MARKER = re.compile("answer:", re.IGNORECASE)
_WHOLE = re.compile(r"\n|</?answer>|\\boxed\{|[^\W\d]\.[* ]*$")
_OTHER_MINUS_SIGNS = str.maketrans(
    dict.fromkeys("\N{MINUS SIGN}\N{EN DASH}\N{SMALL HYPHEN-MINUS}", "-") | {"$": None}
)
_NUMBER = re.compile(
    r"(?:(?<![\w)\]}])[-+])?"  # a sign, unless it is between two terms as in 10-3
    # 1,000 or 1000 or .5 or 1.5
    r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+|(?=\.[0-9]))(?:\.[0-9]+)?"
    r"(?:[eE][-+]?[0-9]{1,3}(?!\w)|\s?/\s?[0-9]+(?:\.[0-9]+)?)?"  # 1e-3 or 3/4
)
_OPERATORS: dict[type, Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def marked_answer(completion: str) -> str | None:
    """Find the text in the last `<answer>` tag, else all text after the last `Answer:`; None when
    neither is there.

    "" for a tag that is not closed: the completion may have been cut off within its answer.
    """
    # The last one counts: earlier ones are part of the reasoning, or quote the instructions.
    text = completion[-MAX_COMPLETION_CHARACTERS:]
    _, tag, tail = text.rpartition("<answer>")
    if tag:
        inside, closing, _ = tail.partition("</answer>")
        return _without_bold(inside.strip()) if closing else ""
    last = _last_match(_ANSWER_MARKER, text)
    if last is None:
        return None
    tail = text[last.end() :]
    if text[: last.start()].endswith("**"):
        # `**Answer:** 42` and `**Answer: 42**`: the bold ends somewhere in the tail.
        tail = tail.replace("**", "", 1)
    return _without_bold(tail.strip())


def without_cut_answer(text: str) -> str:
    """Cut from a text that the token limit cut off what follows its last `Answer:`, if it ends in
    the first line there.

    `Answer: 4` may be the beginning of `Answer: 42`. A line that ends with a word and a full stop
    stays, and so do answers with an end of their own, `<answer>` and `\\boxed{`.
    """
    last = _last_match(_ANSWER_MARKER, text)
    if last is None or _WHOLE.search(text[last.end() :].lstrip("* \t\r\n")):
        return text
    return text[: last.end()]


def _without_bold(text: str) -> str:
    is_bold = text.startswith("**") and text.endswith("**") and text.count("**") == 2
    return text[2:-2].strip() if is_bold else text


def boxed_answer(completion: str) -> str | None:
    r"""Find the text in the braces of the last `\boxed{...}`; None when there is none, "" when it
    is not closed."""
    _, box, tail = completion[-MAX_COMPLETION_CHARACTERS:].rpartition(r"\boxed{")
    if not box:
        return None
    # Braces nest, \boxed{\frac{1}{2}}, so the end is where as many are closed as opened.
    depth = 1
    for end, character in enumerate(tail):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return tail[:end].strip()
    return ""


def final_answer(completion: str) -> str:
    """Find the marked answer, else the last line that is not empty; "" for an empty completion."""
    marked = marked_answer(completion)
    if marked is not None:
        return marked
    last_line = completion[-MAX_COMPLETION_CHARACTERS:].rstrip().rpartition("\n")[2]
    return _without_bold(last_line.strip())


def normalised(text: str) -> str:
    """Return `text` without case, differences of white space, markdown around words, and full
    stops after words."""
    words = text[-MAX_COMPLETION_CHARACTERS:].casefold().split()
    # Only at the ends of words, so that x**2, 2*3 and snake_case stay what they are.
    return " ".join(word.lstrip("*_`#").rstrip("*_`#.") or word for word in words)


def last_number(text: str) -> Fraction | None:
    """Read the last number of the text, exactly: `-1,000`, `$5`, `.5`, `3/4`, `1e-3`; None when
    there is none.

    Currency and percent signs are ignored, so 10% is 10. A division by zero and numbers of more
    than 500 digits are no numbers.
    """
    last = _last_match(_NUMBER, text[-MAX_COMPLETION_CHARACTERS:].translate(_OTHER_MINUS_SIGNS))
    if last is None or len(last[0]) > _MAX_NUMBER_CHARACTERS:
        return None
    # Fractions, not floats: .1 + .2 must be .3.
    numerator, _, denominator = last[0].replace(",", "").partition("/")
    try:
        return Fraction(numerator.strip()) / Fraction(denominator.strip() or 1)
    except ZeroDivisionError:
        return None


def _last_match(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    return next(iter(deque(pattern.finditer(text), maxlen=1)), None)


def evaluate_arithmetic(expression: str) -> tuple[Fraction, list[int]] | None:
    """Compute the exact value of an expression of whole numbers, + - * / and parentheses, and list
    the numbers used in it.

    None for anything else. The text is parsed, never executed: powers, names and calls do not exist
    here.
    """

    def value(node: ast.expr) -> Fraction:
        match node:
            case ast.Constant(value=int(number)) if not isinstance(number, bool):
                numbers.append(number)
                return Fraction(number)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -value(operand)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
                return _OPERATORS[type(op)](value(left), value(right))
        raise SyntaxError("not arithmetic")

    # Long and deeply nested texts can exhaust the parser's memory or stack.
    numbers: list[int] = []
    if len(expression) > _MAX_EXPRESSION_CHARACTERS:
        return None
    try:
        return value(ast.parse(expression.strip(), mode="eval").body), numbers
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None
