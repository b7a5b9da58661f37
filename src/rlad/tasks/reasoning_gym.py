"""Any data set of the optional package reasoning-gym, by name.

Three pitfalls of the package are avoided. It draws item i from Random(seed + i), so data sets with
close seeds share items. Here every problem is a data set of size 1 with its own seed, and the
problem itself decides its split. Some scorers raise, hang, or evaluate the answer as Python code.
Scorers therefore run in a separate process, and answers that could do harm are not passed to those
that evaluate. Partial credit does not count as correct; only a score of 1 does.
"""

import os
import random
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from rlad.errors import UserError, require_package
from rlad.tasks.answers import final_answer, first_line
from rlad.tasks.base import (
    Judgement,
    Problem,
    Split,
    Task,
    Verdict,
    cannot_judge,
    split_of,
    text_key,
    with_feedback,
)
from rlad.tasks.notation import without_wrapping
from rlad.tasks.worker import CallFailed, Worker
from rlad.tasks.written_numbers import evaluate_arithmetic
from rlad.text import nearest

_MAX_TRIES = 1_000
_MAX_FAILURES_IN_A_ROW = 30
_MAX_ANSWER_CHARACTERS = 10_000
_INSTRUCTIONS = (
    "\nReason step by step, then write only the final answer between <answer> and </answer>.\n"
)
_MARKDOWN = str.maketrans("", "", "*_`#")

# The identity of problems whose wording can differ (names, order, template).
_KEYS: dict[str, Callable[[dict[str, Any]], str]] = {
    "countdown": lambda metadata: f"{sorted(metadata['numbers'])} {metadata['target']}",
    "knights_knaves": lambda metadata: str(metadata["statements"]),
    "puzzle24": lambda metadata: str(sorted(metadata["numbers"])),
}

# Data sets whose scorer passes the answer to `eval` or `sympy.parse_expr` (which also evaluates),
# with the characters that are allowed in an answer. Names must be single letters or functions in
# all of them.
_LIST = re.compile(r"[\w\s,'\"\[\]]*", re.ASCII)
_FORMULA = re.compile(r"(?:[\w\s+\-*/()]|\.(?=[0-9]))*", re.ASCII)
_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_FUNCTIONS = frozenset({"sin", "cos", "tan", "asin", "acos", "atan", "exp", "log", "sqrt", "pi"})
_EVALUATED = {
    "binary_matrix": _LIST,
    "intermediate_integration": _FORMULA,
    "n_queens": _LIST,
    "polynomial_multiplication": _FORMULA,
    "simple_integration": _FORMULA,
    "spiral_matrix": _LIST,
    "string_insertion": _LIST,
}
# The scorer of countdown also evaluates the answer; that of puzzle24 accepts numbers that were not
# given.
_ARITHMETIC = frozenset({"countdown", "puzzle24"})
# Generators that iterate over sets of strings, whose order changes with each start of Python.
_NEEDS_HASH_SEED = frozenset(
    {"isomorphic_strings", "knight_swap", "polynomial_multiplication", "ransom_note", "word_ladder"}
)


class ReasoningGym(Task):
    """The problems of the reasoning-gym data set `dataset`, generated with its `options`.

    A completion is correct if the data set's scorer gives its final answer a 1. The reward is then
    1, otherwise 0; with `partial_credit` it is the score. If the scorer raises or takes longer than
    5 seconds, or the data set has no reference answers, the completion cannot be judged. With
    `instructions` the prompt asks for `<answer>` tags.
    """

    def __init__(
        self,
        dataset: str,
        options: Mapping[str, Any] | None = None,
        instructions: bool = True,
        partial_credit: bool = False,
    ) -> None:
        self.name = f"reasoning_gym/{dataset}"
        self._dataset = dataset
        self._options = dict(options or {})
        self._instructions = instructions
        self._partial_credit = partial_credit
        _check(dataset, self._options)
        self._worker = Worker(
            _score,
            timeout_seconds=5.0,
            initializer=partial(_start_scoring, dataset, self._options),
            is_silent=True,
        )
        self.problem("train", 0)  # fails now if the data set refuses the options

    def problem(self, split: Split, index: int, *, seed: int = 0) -> Problem:
        """Draw problems until one is in the split. Raises `UserError` if none is."""
        rng = random.Random(f"{seed}/{split}/{index}")
        # The problem's key decides its split.
        reason = "it has too few different problems"
        num_failures = 0
        for _ in range(_MAX_TRIES):
            try:
                # Seeds fit in 32 bits because some generators pass them on to numpy.
                entry = _create(self._dataset, rng.randrange(2**32 - 1), self._options)[0]
            except Exception as error:  # any error, with wrong options or an unlucky seed
                reason = f"{type(error).__name__}: {error}"
                num_failures += 1
                if num_failures == _MAX_FAILURES_IN_A_ROW:
                    break
                continue
            num_failures = 0
            same = _KEYS.get(self._dataset)
            key = text_key(same(entry["metadata"]) if same else entry["question"])
            if split_of(key) == split:
                question = entry["question"]
                prompt = question + _INSTRUCTIONS if self._instructions else question
                return Problem(prompt, str(entry["answer"] or ""), key, metadata={"entry": entry})
        raise UserError(
            f"the reasoning-gym data set {self._dataset!r} with options {self._options} gives no "
            f"{split} problem ({reason}); choose other options, or another data set."
        )

    def judge(self, problem: Problem, completion: str) -> Judgement:
        entry = problem.metadata["entry"]
        if entry["answer"] is None:
            return cannot_judge(f"the data set {self._dataset!r} has no reference answers")
        answer = final_answer(completion)[:_MAX_ANSWER_CHARACTERS]
        try:
            score = self._score(answer, entry)
            # Scorers compare texts, so also try without remarks after the answer and dollars
            # around it.
            bare = without_wrapping(first_line(answer))
            if score != 1 and bare and bare != answer:
                score = max(score, self._score(bare, entry))
        except CallFailed as failure:
            return cannot_judge(f"scorer of {self._dataset!r}: {failure}")
        if not 0 <= score <= 1:
            return cannot_judge(f"scorer of {self._dataset!r} gave {score}")
        verdict = Verdict.CORRECT if score == 1 else Verdict.WRONG
        judgement = Judgement(verdict, score if self._partial_credit else float(score == 1))
        if self._dataset in _ARITHMETIC:
            return with_feedback(judgement, _what_is_wrong(answer, entry["metadata"]))
        return judgement

    def _score(self, answer: str, entry: dict[str, Any]) -> float:
        if self._dataset in _ARITHMETIC:
            return _score_arithmetic(answer, entry["metadata"])
        if self._dataset == "knights_knaves":
            # For its scorer "**Zoey" and "Zoey" are different names.
            answer = answer.translate(_MARKDOWN)
        is_evaluated = self._dataset in _EVALUATED and answer != entry["answer"]
        if is_evaluated and not _is_harmless(answer, self._dataset):
            return 0.0
        return self._worker.call(answer, entry)

    def close(self) -> None:
        self._worker.close()


def arithmetic(options: Mapping[str, Any] | None = None, **settings: Any) -> ReasoningGym:
    """Make `chain_sum` with easy options, which `options` override."""
    easy = {"min_terms": 2, "max_terms": 4, "min_digits": 1, "max_digits": 2}
    return ReasoningGym("chain_sum", easy | dict(options or {}), **settings)


def countdown(options: Mapping[str, Any] | None = None, **settings: Any) -> ReasoningGym:
    """Make `countdown` with easy options, which `options` override."""
    easy = {"min_numbers": 3, "max_numbers": 4, "max_value": 50}
    easy |= {"min_target": 10, "max_target": 100}
    return ReasoningGym("countdown", easy | dict(options or {}), **settings)


def _check(dataset: str, options: dict[str, Any]) -> None:
    # Some packages that it uses must be compiled, which needs a C compiler.
    require_package("reasoning_gym", "this task", extra="reasoning-gym")
    import reasoning_gym.factory  # pyright: ignore[reportMissingImports]

    known = reasoning_gym.factory.DATASETS
    if dataset not in known:
        hint = nearest(dataset, known) or f"the names are: {', '.join(sorted(known))}."
        raise UserError(f"reasoning-gym has no data set {dataset!r}; {hint}")
    # Seed and size are set by rlad: each problem is a separate data set.
    allowed = sorted(known[dataset][1].__dataclass_fields__.keys() - {"seed", "size"})
    if unknown := sorted(options.keys() - set(allowed)):
        hint = nearest(unknown[0], allowed) or f"use {', '.join(allowed)}."
        raise UserError(
            f"the reasoning-gym data set {dataset!r} has no option {unknown[0]!r}; {hint}"
        )
    if dataset in _NEEDS_HASH_SEED and os.environ.get("PYTHONHASHSEED", "random") in ("", "random"):
        raise UserError(
            f"the problems of the reasoning-gym data set {dataset!r} change with Python's hash "
            "seed; set the environment variable PYTHONHASHSEED=0, so that a run can be repeated."
        )


def _create(dataset: str, seed: int, options: dict[str, Any]) -> Any:
    import reasoning_gym  # pyright: ignore[reportMissingImports]

    return reasoning_gym.create_dataset(dataset, seed=seed, size=1, **options)


def _is_harmless(answer: str, dataset: str) -> bool:
    """Return whether evaluating the answer can only build a literal or a formula."""
    has_harmless_names = all(len(n) == 1 or n in _FUNCTIONS for n in _NAME.findall(answer))
    return bool(_EVALUATED[dataset].fullmatch(answer)) and has_harmless_names


def _what_is_wrong(answer: str, metadata: dict[str, Any]) -> str:
    """Say what is wrong with a wrong expression."""
    result = evaluate_arithmetic(answer)
    if result is None:
        return "No expression of whole numbers, + - * / and parentheses could be read."
    value, numbers = result
    if sorted(numbers) != sorted(metadata["numbers"]):
        used, given = (", ".join(map(str, sorted(ns))) for ns in (numbers, metadata["numbers"]))
        return f"It uses the numbers {used}, not each of {given} once."
    return f"It comes to {value}, not to {metadata.get('target', 24)}."


def _score_arithmetic(answer: str, metadata: dict[str, Any]) -> float:
    """Return 1 if the answer uses exactly the given numbers and reaches the target, otherwise 0."""
    result = evaluate_arithmetic(answer)
    if result is None:
        return 0.0
    value, numbers = result
    uses_the_numbers = sorted(numbers) == sorted(metadata["numbers"])
    return float(uses_the_numbers and value == metadata.get("target", 24))


# --- in the worker process ------------------------------------------------------------------------

_scorer: Callable[[str, dict[str, Any]], float]


def _start_scoring(dataset: str, options: dict[str, Any]) -> None:
    global _scorer
    _scorer = _create(dataset, 0, options).score_answer


def _score(answer: str, entry: dict[str, Any]) -> float:
    return float(_scorer(answer, entry))
