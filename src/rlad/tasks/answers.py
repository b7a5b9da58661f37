"""The answer in a completion: pure functions that never raise on any text.

All of them are linear in the length of the text, and read only its last
`MAX_COMPLETION_CHARACTERS`.
"""

import re
import unicodedata
from collections import deque
from collections.abc import Callable

from rlad.tasks.boxes import boxed_answer, in_braces, with_braces, with_context
from rlad.tasks.denials import is_taken_back
from rlad.tasks.restatements import gives_another

MAX_COMPLETION_CHARACTERS = 200_000

IDLE_NAMES = frozenset(
    ("answer", "ans", "result", "total", "value", "sum", "solution", "final", "output", "number")
) | {"so", "thus", "hence", "therefore"}
"""Names before a value that only mark it as the answer"""

# Models write **Answer**: and __Answer:__ as well as Answer:, and use colons of other scripts. In
# "counteranswer:", "non-answer:" and "my_answer:" the word is a part of another word.
_ANSWER_MARKER = re.compile(
    r"(?<![^\W_])(?<![^\W_]_)(?<![-\N{HYPHEN}\N{NON-BREAKING HYPHEN}])answer"
    r"(?:[*_`~}\t \xa0]|</(?:b|i|em|strong)>)*+"
    "[:\N{FULLWIDTH COLON}\N{SMALL COLON}\N{PRESENTATION FORM FOR VERTICAL COLON}\N{RATIO}]",
    re.IGNORECASE,
)
_CLOSING_MARKS = re.compile(r"(?:\s|}|</(?:b|i|em|strong)>|[*_`~]++(?=\s|$))+")
_WORD_AND_STOP = re.compile(r"[^\W\d]\.[*_` ]*$")
_WHOLE = re.compile(rf"\n|</?answer>|\\boxed\{{|{_WORD_AND_STOP.pattern}")
_CUT = "\N{HORIZONTAL ELLIPSIS}"
"""replaces a last line that was cut off"""
_TAG_BEFORE = re.compile(
    r"<answer>([^<>]*+)</answer>(?:[^\w<>]|\b(?:or|and|maybe|perhaps|possibly|also)\b)*+\Z",
    re.IGNORECASE,
)
_MARKS = "*_`"
_NEXT_SENTENCE = re.compile(r"(?<=[\w$*)}])[.!]\s+(?=[^\W\d])")
_PROSE = re.compile(
    r"(?!.*\banswer is\W*+\S++$)(?:\W*[^\W\d_]{2}|.*(?<!\\)\b[^\W\d_]{2,}.*(?<!\\)\b[^\W\d_]{2})"
)
_DONE = " \t\r\N{CHECK MARK}\N{HEAVY CHECK MARK}\N{WHITE HEAVY CHECK MARK}\N{VARIATION SELECTOR-16}"
_CLOSING_SENTENCE = re.compile(r"I hope (?:it|this) is correct[.!]?$")
# Each run of marks is tried once, from its start: no pattern backtracks.
_CLOSING_MARK = re.compile(r"(?:(?<!\*)\*{2,}+|(?<!_)_{2,}+|(?<!`)`{2,}+|[*_`](?=\.))\.*+$")


def outside_thoughts(completion: str) -> str:
    """Remove everything from `<think>` to `</think>`, or from the start of the text if the prompt
    contains the first `<think>`. Return "" if a `<think>` is not closed.

    Thoughts are not answers: they may weigh several.
    """
    *closed, last = completion.split("</think>")
    if "<think>" in last:
        return ""
    before = [part.partition("<think>")[0] for part in closed if "<think>" in part]
    return "".join([*before, last])


def marked_answer(completion: str) -> str | None:
    """Find the text in the last `<answer>` tag, or otherwise all text after the last `Answer:`;
    None without either.

    Return "" for a tag that is not closed: the completion may have been truncated in its answer.
    """
    # The last one counts. Earlier ones are part of the reasoning, or quote the instructions.
    text = outside_thoughts(completion)[-MAX_COMPLETION_CHARACTERS:]
    tagged = _tagged_answer(text)
    if tagged is not None:
        return tagged
    last = _last_match(_ANSWER_MARKER, text)
    return None if last is None else _after_marker(text, last)


def _tagged_answer(text: str) -> str | None:
    before, tag, tail = text.rpartition("<answer>")
    inside, closing, rest = tail.partition("</answer>")
    if not tag:
        return None
    if (other := _TAG_BEFORE.search(before)) and normalised(other[1]) != normalised(inside):
        return ""
    remarks = rest.partition("\n")[2]
    is_kept = closing and not (is_taken_back(remarks) or gives_another(rest, inside))
    return _without_marks(inside) if is_kept else ""


def _after_marker(whole: str, marker: re.Match[str]) -> str:
    """Return the text after a marker, without the closing markdown of the marker:
    `**Answer:** 42`, `**Answer: 42**`."""
    before = whole[: marker.start()].rpartition("\n")[2]
    tail = whole[marker.end() :]
    closing = _CLOSING_MARKS.match(tail)
    text = tail[closing.end() if closing else 0 :].strip()
    line, newline, rest = text.partition("\n")
    bare = line.rstrip(_DONE)
    end = bare.rstrip(_MARKS)
    mark = bare[len(end) :]
    # Marks that also begin the line belong to it: **_5_**
    opened = end[: len(end) - len(end.lstrip(_MARKS))][::-1]
    if opened and mark.startswith(opened):
        end += opened
        mark = mark.removeprefix(opened)
    # Marks that end the first line but do not begin in it began before the marker, or are part of
    # the answer, as in A*.
    if mark and mark not in end and (mark[0] in before or len(mark) > 1):
        text = end.rstrip() + newline + rest
    return _without_marks(text)


def without_cut_answer(text: str) -> str:
    """Remove the answer after the last `Answer:` of a truncated text, if the text ends in the first
    line of that answer.

    `Answer: 4` may be the beginning of `Answer: 42`. A line that ends with a word and a full stop
    is kept, and so are answers that have an end mark, `<answer>` and `\\boxed{`.
    """
    last = _last_match(_ANSWER_MARKER, text)
    if last is None or _WHOLE.search(text[last.end() :].lstrip("*_`~} \t\r\n")):
        return text
    return text[: last.end()]


def without_cut_ending(text: str) -> str:
    """Remove the last answer of a truncated text, if the text ends in it. If no answer is marked,
    add a line that shows the cut, as otherwise the last line would be read as the answer: `so 18`
    may be the beginning of `so 180`."""
    text = without_cut_answer(text)
    if text.endswith("\n") or _WORD_AND_STOP.search(text) or decided_answer(text)[1]:
        return text
    return f"{text}\n{_CUT}"


def without_note(text: str) -> str:
    """Remove the line that `without_cut_ending` added."""
    return text.removesuffix(f"\n{_CUT}")


def _without_marks(text: str) -> str:
    """Remove marks around the whole text: `**2**`, `` `2` ``."""
    text = text.strip()
    for mark in ("***", "**", "__", "*", "_", "`"):
        inner = text[len(mark) : -len(mark)]
        if text == f"{mark}{inner}{mark}" and inner and mark[0] not in inner:
            return inner.strip()
    return text


def final_answer(completion: str) -> str:
    r"""Find the text in the last `<answer>` tag; without one, that in the last `\boxed{...}` or
    after the last `Answer:`, whichever is later; without these, the last line that is not empty;
    otherwise "".

    If there is a box within the tag or after the marker, its content is the answer.
    """
    found, _ = decided_answer(completion)
    return found


def decided_answer(completion: str) -> tuple[str, bool]:
    """Find the final answer, and whether it is marked as one."""
    text = with_braces(outside_thoughts(completion)[-MAX_COMPLETION_CHARACTERS:])
    text = _CLOSING_SENTENCE.sub("", text.rstrip()).rstrip()
    tagged = _tagged_answer(text)
    if tagged is not None:
        text = tagged
    last = _last_match(_ANSWER_MARKER, text)
    marked = "" if last is None else _after_marker(text, last)
    box_start = text.rfind(r"\boxed{")
    # An "Answer:" without text after it does not replace a box before it.
    if box_start >= 0 and (not marked or last is None or box_start > last.start()):
        found, after = in_braces(text[box_start + len(r"\boxed{") :])
        found = _without_marks(found)
        return with_context(found, text[:box_start], after) if found else "", True
    if last is not None:
        return marked, True
    if tagged is not None:
        return tagged, True
    line = _without_marks(text.rstrip().rpartition("\n")[2])
    return line if line != _CUT else "", False


def _after_hashes(answer: str) -> str:
    """Find the text after the last `####`, as in the solutions of GSM8K; "" without one."""
    _, mark, found = answer.rpartition("####")
    return found.strip() if mark else ""


ANSWER_FORMATS: dict[str, Callable[[str], str]] = {
    "whole": str.strip,
    "gsm8k": _after_hashes,
    "boxed": lambda answer: boxed_answer(answer[-MAX_COMPLETION_CHARACTERS:]) or "",
    "last": final_answer,
}
"""How a reference answer is found in its field; "" if there is none"""


def first_line(answer: str) -> str:
    r"""Find the first line of a final answer, without remarks after it; "" if these take it back. A
    formula that begins with `$$`, `\[` or a fence is read whole."""
    text = answer.strip()
    for opening, closing in (("$$", "$$"), (r"\[", r"\]"), ("```", "```")):
        if text.startswith(opening):
            inner, closed, rest = text[len(opening) :].partition(closing)
            if opening == "$$" and "$$" in rest.partition("\n")[0]:
                return text.partition("\n")[0].replace("$$", "$")  # $$5$$ or $$6$$
            is_kept = closed and not (is_taken_back(rest) or gives_another(rest, inner))
            return inner.strip() if is_kept else ""
    line, _, remarks = text.partition("\n")
    if is_taken_back(remarks) or gives_another(remarks, line):
        return ""
    # 5. The answer is six.
    value, *added = _NEXT_SENTENCE.split(line, maxsplit=1)
    is_kept = not added or _PROSE.match(value) or not gives_another(added[0], value)
    return line.strip() if is_kept else ""


def normalised(text: str) -> str:
    """Return `text` in one case and with single spaces, without markdown around words and full
    stops after words."""
    text = unicodedata.normalize("NFC", text[-MAX_COMPLETION_CHARACTERS:])
    text = text.replace("\N{MINUS SIGN}", "-").replace("\N{LATIN CAPITAL LETTER SHARP S}", "ß")
    # Maße are not Masse.
    words = "ß".join(part.casefold() for part in text.split("ß")).split()
    words = [word for word in words if word.strip("#") or word == "#"] or words
    words = [_CLOSING_MARK.sub("", word) or word for word in words]
    # Marks are removed only at the ends of words, so that x**2, 2*3 and snake_case stay unchanged.
    # A mark that ends a word but begins none, as in C# and A*, is part of the word.
    opened = {word[0] for word in words if word[0] in "*_`#" and word.strip("*_`#")}
    closing = "".join(opened) + "."
    bare = " ".join(word.lstrip("*_`#").rstrip(closing) or word for word in words)
    # Some letters are composed differently in upper and lower case.
    return unicodedata.normalize("NFC", bare)


def _last_match(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    return next(iter(deque(pattern.finditer(text), maxlen=1)), None)
