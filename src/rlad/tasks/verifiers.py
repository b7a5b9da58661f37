"""Verifiers by name: how a completion is compared with the reference answer of its problem.

- `exact`: the final answer is the same text, apart from case, white space, markdown and LaTeX
  formatting.
- `number`: the final answer gives the same number (see `rlad.tasks.numbers`).
- `math`: the final answer is mathematically equal (see `rlad.tasks.mathematics`).
- `package.module:function`: a user's function, `function(completion: str, answer: str)`, that
  returns a bool, a reward from 0 to 1 (1 within rounding is correct) or a `Verdict`; or a pair of
  this and a text that says what is wrong with the completion.

The final answer is the text in the last `<answer>` tag, or otherwise in the last `\\boxed{...}` or
after the last `Answer:`, whichever is later, or otherwise the last line. Text in `<think>` does not
count. `math` and a user's functions run in a separate process. One that hangs, raises, dies, uses
too much memory or returns anything else costs one completion (cannot judge), never the run.
"""

import importlib
import inspect
import logging
import re
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from typing import Any

from rlad.errors import UserError, require_package
from rlad.tasks.answers import (
    IDLE_NAMES,
    MAX_COMPLETION_CHARACTERS,
    decided_answer,
    final_answer,
    first_line,
    normalised,
    outside_thoughts,
    without_note,
)
from rlad.tasks.base import Judgement, Verdict, cannot_judge, judged, with_feedback
from rlad.tasks.notation import without_wrapping
from rlad.tasks.numbers import Amount, Figures, Reading, Unreadable, read_number
from rlad.tasks.worker import MAX_MEMORY_GIB, CallFailed, Worker
from rlad.text import nearest

_MAX_SHORT_REFERENCE = 60
"""most characters of a reference that is only an answer, without prose"""
_NAME = re.compile(r"[$\s]*([^\W\d_]+)\s*[:=](?=[^=])")
_ROUNDING = 1e-9
"""tolerance at the bounds, for rewards that are sums of parts"""


@dataclass(frozen=True, slots=True)
class Verifier:
    """A grader of completions. `judge` never raises or hangs on any text. `close` ends the worker
    process."""

    grade: Callable[[str, str], Judgement]
    worker: Worker | None = None
    reads_final_answer: bool = True

    def judge(self, completion: str, answer: str) -> Judgement:
        """Compare the last `MAX_COMPLETION_CHARACTERS` of a completion with the reference
        answer."""
        # The <think> of these characters may begin before them, so thoughts are removed first.
        text = outside_thoughts(completion) if self.reads_final_answer else completion
        text = text[-MAX_COMPLETION_CHARACTERS:]
        try:
            judgement = self.grade(text, answer)
        except CallFailed as failure:
            return cannot_judge(str(failure))
        if not self.reads_final_answer:
            return judgement
        return with_feedback(judgement, _what_is_wrong(text))

    def close(self) -> None:
        if self.worker is not None:
            self.worker.close()


def _what_is_wrong(completion: str) -> str:
    # The completion is not quoted, since a teacher that is shown the feedback would repeat it.
    if final_answer(completion).strip():
        return "The final answer is wrong."
    return "No final answer could be read."


def make_verifier(
    name: str, *, timeout_seconds: float = 5.0, max_memory_gib: float = MAX_MEMORY_GIB
) -> Verifier:
    """Make the verifier called `name`. Raises `UserError` if it is unknown, or if a package that it
    needs is missing."""
    limits: Any = {"timeout_seconds": timeout_seconds, "max_memory_gib": max_memory_gib}
    if name in _IN_PROCESS:
        return Verifier(_IN_PROCESS[name])
    if name == "math":
        require_package("math_verify", "the verifier 'math'", extra="math")
        worker = Worker(_math, **limits, initializer=_warm_up_math, is_silent=True)
    elif ":" in name:
        import_function(name)
        initializer = partial(import_function, name)
        worker = Worker(partial(_call_user, name), **limits, initializer=initializer)
    else:
        names = [*_IN_PROCESS, "math"]
        raise UserError(
            f"unknown verifier {name!r}; use {', '.join(map(repr, names))} or a function of your "
            f"own as 'package.module:function'; {nearest(name, names)}".removesuffix("; ")
        )
    return Verifier(worker.call, worker, reads_final_answer=":" not in name)


def exact(completion: str, answer: str) -> Judgement:
    """Judge whether the final answer is `answer`, apart from case, white space, markdown and LaTeX
    formatting.

    Remarks may follow on separate lines.
    """
    wanted = normalised(without_wrapping(answer))
    if not wanted:
        return cannot_judge("the answer is empty")
    found, _ = decided_answer(completion)
    first = first_line(found)
    parts = (found, found.partition("\n\n")[0] if first else "", first)
    is_same = any(normalised(without_wrapping(part)) == wanted for part in parts)
    return judged(is_same and _has_marks_of(answer, completion, found))


def _has_marks_of(answer: str, completion: str, found: str) -> bool:
    """Return whether an answer has the marks of a reference such as `__init__` or `#include`, which
    are not markdown."""
    wanted = " ".join(without_wrapping(answer).casefold().split())
    for mark in ("**", "`"):
        wanted = wanted.removeprefix(mark).removesuffix(mark) if wanted.endswith(mark) else wanted
    if all(wanted.count(mark) <= normalised(wanted).count(mark) for mark in "*_`#"):
        return True
    start = max(0, completion.rfind(found) - 3)
    around = " ".join(completion[start : start + len(found) + 6].casefold().split())
    ends = re.escape(wanted[0]), re.escape(wanted[-1])
    return bool(re.search(rf"(?<!{ends[0]}){re.escape(wanted)}(?!{ends[1]})", around))


def number(completion: str, answer: str) -> Judgement:
    """Judge whether the final answer gives the same number as `answer`.

    If the reference has several numbers, such as a time or a point, the answer must have the same
    numbers in the same form.
    """
    wanted = _number_of(answer, _marked_reference(answer))
    if wanted is None:
        return cannot_judge(f"the reference answer {answer[:80]!r} has no number")
    if isinstance(wanted, Unreadable):
        return cannot_judge(f"the reference answer {answer[:80]!r} is no plain number")
    is_same = _same(_number_of(completion), wanted)
    if is_same and _differ_in_name(completion, answer):
        is_same = None
    if is_same is None:
        return cannot_judge(f"it counts another thing than the reference answer {answer[:80]!r}")
    return judged(is_same)


def _differ_in_name(completion: str, answer: str) -> bool:
    """Return whether two answers name different things as their subject: Bob: 5."""
    names = [_NAME.match(first_line(decided_answer(text)[0])) for text in (completion, answer)]
    found, wanted = (match[1].casefold() if match else "answer" for match in names)
    return found != wanted and not {found, wanted} & IDLE_NAMES


def _marked_reference(answer: str) -> str | None:
    """Find the answer in a reference: the text after `####`, or a whole short line; None for
    prose."""
    if "####" in answer:
        return answer.rpartition("####")[2]
    text, is_marked = decided_answer(answer)
    is_short = "\n" not in answer.strip() and len(answer) <= _MAX_SHORT_REFERENCE
    return text if is_short and not is_marked else None


def _number_of(text: str, answer: str | None = None) -> Reading:
    found, is_marked = (answer, True) if answer is not None else decided_answer(text)
    return read_number(first_line(found), is_marked=is_marked)


def _same(found: Reading, wanted: Amount | Figures) -> bool | None:
    """Return whether two readings are equal. Units count if both are known. If one reading has a
    known unit and the other an unknown word, the result is None."""
    if isinstance(found, Amount) and isinstance(wanted, Amount) and found.unit and wanted.unit:
        (found_kind, found_size), (wanted_kind, wanted_size) = found.unit, wanted.unit
        is_equal = found.value * found_size == wanted.value * wanted_size
        return found_kind == wanted_kind and is_equal
    if isinstance(found, Amount) and isinstance(wanted, Amount):
        is_mixed = (found.unit and wanted.counted) or (wanted.unit and found.counted)
        return None if is_mixed and found.value == wanted.value else found.value == wanted.value
    return found == wanted


_IN_PROCESS: dict[str, Callable[[str, str], Judgement]] = {"exact": exact, "number": number}


# --- in the worker process ------------------------------------------------------------------------


def _warm_up_math() -> None:
    # It warns that its own timeouts are off, which is intended.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    _math("1", "1")


def _math(completion: str, answer: str) -> Judgement:
    from rlad.tasks.mathematics import judge_math  # imports sympy

    return judge_math(completion, answer)


def import_function(path: str) -> Callable[..., Any]:
    """Import the function that `package.module:function` names. Raises `UserError` if there is none
    that takes a completion and an answer."""
    module, _, name = path.partition(":")
    try:
        with redirect_stdout(sys.stderr):  # what a module prints is not the command's output
            function = getattr(importlib.import_module(module), name)
        inspect.signature(function).bind("completion", "answer")
    except Exception as error:  # the user's module may raise anything
        raise UserError(
            f"verifier {path!r} cannot be used ({type(error).__name__}: {error}); write it as "
            "'package.module:function', a function(completion, answer), with the folder of the "
            "package on PYTHONPATH."
        ) from error
    return function


def _call_user(path: str, completion: str, answer: str) -> Judgement:
    result: Any = import_function(path)(without_note(completion), answer)
    match result:
        case (result, str(feedback)):
            return with_feedback(_judgement_of(result), feedback)
    return _judgement_of(result)


def _judgement_of(result: Any) -> Judgement:
    # Any other result cannot be judged, as its meaning would be a guess.
    match result.item() if hasattr(result, "item") else result:  # scalars of numpy and torch
        case Verdict.CANNOT_JUDGE:
            return cannot_judge("the verifier says so")
        case Verdict() as verdict:
            return judged(verdict is Verdict.CORRECT)
        case bool(is_correct):
            return judged(is_correct)
        case int(reward) | float(reward) if -_ROUNDING <= reward <= 1 + _ROUNDING:
            # .7 + .2 + .1 is not quite 1, and .2 + .4 + .3 + .1 a little more.
            if abs(reward - 1) <= _ROUNDING:
                return judged(True)
            return Judgement(Verdict.WRONG, max(0.0, float(reward)))
    return cannot_judge(
        f"the verifier returned {result!r:.80}, not a bool, a number from 0 to 1 or a Verdict"
    )
