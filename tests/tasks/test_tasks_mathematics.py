"""The verifier `math`: right is right in any form, nothing else is, and what is not understood to
its last sign is not judged."""

import itertools
import math
import time

import pytest
from hypothesis import HealthCheck, given, seed, settings

from answer_classes import CLASSES, rows
from rlad.tasks.base import Verdict
from written_answers import pairs

pytest.importorskip("math_verify", reason="needs the optional package math-verify")
from rlad.tasks.answer_kinds import NotRead
from rlad.tasks.math_answers import read_answer
from rlad.tasks.mathematics import compare, judge_math


@pytest.mark.parametrize(("verdict", "answer", "completion"), rows("math_cases.txt"))
def test_math(verdict, answer, completion):
    judgement = judge_math(completion, answer)
    assert judgement.verdict == verdict, judgement
    assert math.isnan(judgement.reward) is (verdict == Verdict.CANNOT_JUDGE)


@pytest.mark.parametrize("answers", CLASSES, ids=lambda answers: answers[0])
def test_equal_answers_are_correct_for_each_other(answers):
    """What is not understood is equal to itself alone."""
    for found, wanted in itertools.product(answers, answers):
        assert compare(read_answer(found), read_answer(wanted)) is True, (found, wanted)


def test_answers_of_different_classes_are_never_correct():
    """Every tenth of all pairs; `benchmarks/fuzz.py` tries each."""
    read = [(i, text, read_answer(text)) for i, texts in enumerate(CLASSES) for text in texts]
    for found, wanted in itertools.islice(itertools.permutations(read, 2), 0, None, 10):
        if found[0] != wanted[0]:
            assert compare(found[2], wanted[2]) is not True, (found[1], wanted[1])


@seed(1)
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(pairs())
def test_answers_in_random_forms_are_equal_iff_they_are(example):
    found, wanted, is_equal = example
    result = compare(read_answer(found), read_answer(wanted))
    if is_equal is not None:
        assert result in (is_equal, None), (found, wanted)


@pytest.mark.parametrize(
    "placeholder",
    ["proof", "Proof.", "notfound", "not found", "N/A", "None", "nan", "null", "?", "", "  ", "-"],
)
def test_a_placeholder_cannot_be_judged(placeholder):
    for completion in (rf"\boxed{{{placeholder}}}", r"\boxed{42}", "no idea"):
        assert judge_math(completion, placeholder).verdict == Verdict.CANNOT_JUDGE


@pytest.mark.parametrize("text", ["(" * 2000, "9^9^9^9", r"\frac{" * 300, "9!" * 50, "1" * 3000])
def test_what_is_too_much_is_not_read(text):
    assert isinstance(read_answer(text), NotRead)


@pytest.mark.parametrize(
    ("answer", "completion"),
    [
        ("5", f"Answer: 0.{'3' * 1000}\N{HORIZONTAL ELLIPSIS}\n"),
        ("5", f"Answer: {'3' * 1900}e"),
        ("x=5", r"\boxed{x^{20000}=5^{20000}}"),
        ("y=x", r"\boxed{(x+y+1)^{300}=0}"),
        ("5", r"\boxed{\exp(\exp(\exp(\exp(5))))}"),
    ],
)
def test_long_numbers_and_large_powers_take_less_than_the_limit(answer, completion):
    """The verifier's process has 5 seconds."""
    started = time.process_time()
    assert judge_math(completion, answer).verdict != Verdict.CORRECT
    assert time.process_time() - started < 4
