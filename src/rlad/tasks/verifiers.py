"""Verifiers by name: how a completion is compared with the reference answer of its problem.

- `exact`: the final answer is the same text, apart from case, white space and markdown.
- `number`: the last number of the final answer is the same number (`1,000`, `$5`, `.5`, `3/4`,
  `10%` as 10).
- `math`: the text in the last `\\boxed{...}`, else the final answer, is mathematically equal (LaTeX
  too), judged by the optional package math-verify.
- `package.module:function`: a function of your own, `function(completion: str, answer: str)`, that
  returns a bool, a reward from 0 to 1 (only 1 counts as correct) or a `Verdict`; or a pair of
  that and a text, what is wrong with the completion.

The final answer is the text in the last `<answer>` tag, else after the last `Answer:`, else the
last line. `math` and functions of your own run in a process of their own: one that hangs, raises,
dies, eats memory or returns anything else costs one completion (cannot judge), never the run.
"""

import importlib
import inspect
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from rlad.errors import UserError, require_package
from rlad.tasks.answers import (
    MAX_COMPLETION_CHARACTERS,
    boxed_answer,
    final_answer,
    last_number,
    normalised,
)
from rlad.tasks.base import Judgement, Verdict, cannot_judge, judged, with_feedback
from rlad.tasks.worker import MAX_MEMORY_GIB, CallFailed, Worker
from rlad.text import nearest

_MAX_MATH_CHARACTERS = 2_000
_PROSE = re.compile(r"(?<!\\)\b[A-Za-z]{2,} [A-Za-z]{2,}")


@dataclass(frozen=True, slots=True)
class Verifier:
    """A grader of completions. `judge` never raises and never hangs on any text; `close` releases
    the worker process."""

    grade: Callable[[str, str], Judgement]
    worker: Worker | None = None
    reads_final_answer: bool = True

    def judge(self, completion: str, answer: str) -> Judgement:
        """Compare the last `MAX_COMPLETION_CHARACTERS` of a completion with the reference
        answer."""
        text = completion[-MAX_COMPLETION_CHARACTERS:]
        try:
            judgement = self.grade(text, answer)
        except CallFailed as failure:
            return cannot_judge(str(failure))
        return (
            with_feedback(judgement, _what_was_read(text)) if self.reads_final_answer else judgement
        )

    def close(self) -> None:
        if self.worker is not None:
            self.worker.close()


def _what_was_read(completion: str) -> str:
    read = boxed_answer(completion) or final_answer(completion).strip()
    if not read:
        return "No final answer could be read."
    return f"The final answer was read as {read[:200]!r}, which is wrong."


def make_verifier(
    name: str, *, timeout_seconds: float = 5.0, max_memory_gib: float = MAX_MEMORY_GIB
) -> Verifier:
    """Make the verifier called `name`; `UserError` when there is none, or when what it needs is
    missing."""
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
    """Judge whether the final answer is `answer`, apart from case, white space and markdown."""
    wanted = normalised(answer)
    if not wanted:
        return cannot_judge("the answer is empty")
    return judged(normalised(final_answer(completion)) == wanted)


def number(completion: str, answer: str) -> Judgement:
    """Judge whether the last number of the final answer (of the completion, if that has only words)
    is the last one of `answer`."""
    wanted = last_number(answer)
    if wanted is None:
        return cannot_judge(f"the reference answer {answer[:80]!r} has no number")
    if "<answer>" not in completion and boxed_answer(completion) == "":
        return judged(False)
    # "Answer: as computed above" points to a number before it.
    final = final_answer(completion)
    found = last_number(final)
    return judged((last_number(completion) if final and found is None else found) == wanted)


_IN_PROCESS: dict[str, Callable[[str, str], Judgement]] = {"exact": exact, "number": number}


# --- in the worker process ------------------------------------------------------------------------


def _warm_up_math() -> None:
    # It warns that its own timeouts are off, which they are on purpose.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    _parse_math("1")


def _parse_math(text: str) -> list[Any]:
    """Read `text` with math-verify: a bare formula needs dollars around it, prose must not have
    them."""
    from math_verify import parse

    text = text[-_MAX_MATH_CHARACTERS:].replace(r"\$", "")
    is_marked = any(sign in text for sign in ("$", r"\boxed", r"\(", r"\["))
    is_bare = not is_marked and not _PROSE.search(text)
    # Its timeouts rest on signals, which exist only in a main thread; the worker process has its
    # own clock.
    return parse(f"${text}$" if is_bare else text, parsing_timeout=None)  # pyright: ignore[reportArgumentType]


def _math(completion: str, answer: str) -> Judgement:
    from math_verify import verify

    # A box counts before other marks, as models of mathematics put their answer there; but not
    # where the prompt has asked for tags and there are some.
    wanted = _parse_math(answer)
    if not wanted:
        return cannot_judge(f"math-verify cannot read the reference answer {answer[:80]!r}")
    boxed = None if "<answer>" in completion else boxed_answer(completion)
    found = _parse_math(final_answer(completion) if boxed is None else boxed)
    return judged(verify(wanted, found, timeout_seconds=None))


def import_function(path: str) -> Callable[..., Any]:
    """Import the function that `package.module:function` names; `UserError` when there is none that
    takes a completion and an answer."""
    module, _, name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
        inspect.signature(function).bind("completion", "answer")
    except Exception as error:  # of any kind: the module is the user's
        raise UserError(
            f"verifier {path!r} cannot be used ({type(error).__name__}: {error}); write it as "
            "'package.module:function', a function(completion, answer), with the folder of the "
            "package on PYTHONPATH."
        ) from error
    return function


def _call_user(path: str, completion: str, answer: str) -> Judgement:
    result: Any = import_function(path)(completion, answer)
    match result:
        case (result, str(feedback)):
            return with_feedback(_judgement_of(result), feedback)
    return _judgement_of(result)


def _judgement_of(result: Any) -> Judgement:
    # Where a verifier returns something else, we do not guess what it meant.
    match result.item() if hasattr(result, "item") else result:  # scalars of numpy and torch
        case Verdict.CANNOT_JUDGE:
            return cannot_judge("the verifier says so")
        case Verdict() as verdict:
            return judged(verdict is Verdict.CORRECT)
        case bool(is_correct):
            return judged(is_correct)
        case int(reward) | float(reward) if 0 <= reward <= 1:
            return Judgement(Verdict.CORRECT if reward == 1 else Verdict.WRONG, float(reward))
    return cannot_judge(
        f"the verifier returned {result!r:.80}, not a bool, a number from 0 to 1 or a Verdict"
    )
