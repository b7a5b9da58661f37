import math
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlad.tasks.base import Verdict
from rlad.tasks.verifiers import exact, import_function, make_verifier, number

CORRECT = Verdict.CORRECT
WRONG = Verdict.WRONG
CANNOT_JUDGE = Verdict.CANNOT_JUDGE


@pytest.mark.parametrize(
    ("completion", "answer", "verdict"),
    [
        ("Let me see. Answer: **Paris**.", "paris", CORRECT),
        ("<answer>\n New   York </answer>", "New York", CORRECT),
        ("London, no:\nParis", "Paris", CORRECT),
        ("Answer: Paris or London", "Paris", WRONG),
        ("Answer: 2*3", "23", WRONG),
        ("<answer></answer>", "Paris", WRONG),
        ("", "Paris", WRONG),
        ("", " ", CANNOT_JUDGE),
    ],
)
def test_exact(completion, answer, verdict):
    assert exact(completion, answer).verdict == verdict


@pytest.mark.parametrize(
    ("completion", "answer", "verdict"),
    [
        ("She has 3 + 4 = 7 apples.\nAnswer: $1,000.00 in all", "1000", CORRECT),
        ("so 0.75", "3/4", CORRECT),
        ("so 0.333333", "1/3", WRONG),  # compared exactly
        ("<answer>18</answer> and 19", "It is 9 * 2.\n#### 18", CORRECT),
        ("It is 18.\nAnswer: what I said", "18", CORRECT),  # no number in the final answer
        ("It is 18.\n<answer>1", "18", WRONG),  # cut off within its answer
        ("It is 18.\n<answer>18", "18", WRONG),
        ("It is 18.\nAnswer:", "18", WRONG),
        (r"Answer: \boxed{4", "4", WRONG),
        (r"so \boxed{4}", "4", CORRECT),
        ("10%", "10", CORRECT),
        ("10%", "0.1", WRONG),
        ("-5", "5", WRONG),
        ("seven", "7", WRONG),
        ("7", "seven", CANNOT_JUDGE),
    ],
)
def test_number(completion, answer, verdict):
    assert number(completion, answer).verdict == verdict


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=()), max_size=100), st.text(max_size=20))
def test_exact_and_number_judge_any_text(completion, answer):
    for judgement in (exact(completion, answer), number(completion, answer)):
        assert (
            str(judgement.reward)
            == {CORRECT: "1.0", WRONG: "0.0", CANNOT_JUDGE: "nan"}[judgement.verdict]
        )


# --- math -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def math_verifier():
    pytest.importorskip("math_verify", reason="needs the optional package math-verify")
    verifier = make_verifier("math", timeout_seconds=3)
    yield verifier
    verifier.close()


@pytest.mark.parametrize(
    ("completion", "answer", "verdict"),
    [
        (r"so \boxed{\frac{1}{2}}", "0.5", CORRECT),
        ("<answer>1/2</answer>", r"\frac{1}{2}", CORRECT),
        ("<answer>42</answer>", "42", CORRECT),
        (r"first \boxed{1}, then \boxed{2\sqrt{2}}. Done, 5.", r"\sqrt{8}", CORRECT),
        ("Answer: x^2+2x+1", "(x+1)^2", CORRECT),
        ("Answer: x = 3", "3", CORRECT),
        (r"Answer: \{2, 1\}", r"$\{1, 2\}$", CORRECT),
        ("It follows that the total is 7.", "7", CORRECT),
        ("The value is $\\frac{3}{4}$.", "0.75", CORRECT),
        (r"\boxed{336}", r"336^\circ", CORRECT),
        (r"\boxed{1,000}", "1000", CORRECT),
        (r"<answer>\$5</answer>", "5", CORRECT),
        ("<answer>(2,1)</answer>", "(1,2)", WRONG),
        ("<answer>x^2+1</answer>", "1", WRONG),
        (r"\boxed{3} <answer>4</answer>", "3", WRONG),
        ("no idea", "3", WRONG),
        ("", "3", WRONG),
        ("3", "", CANNOT_JUDGE),
    ],
)
def test_math(math_verifier, completion, answer, verdict):
    judgement = math_verifier.judge(completion, answer)
    assert judgement.verdict == verdict, judgement


def test_math_that_hangs_costs_one_completion(math_verifier):
    impatient = make_verifier("math", timeout_seconds=1)
    started = time.monotonic()
    judgement = impatient.judge(
        "<answer>" + "(" * 2000 + "</answer>", "3"
    )  # takes math-verify longer than that
    assert (judgement.verdict, judgement.reason) == (CANNOT_JUDGE, "no result within 1 seconds")
    assert time.monotonic() - started < 6
    assert impatient.judge(r"\boxed{3}", "3").verdict == CORRECT
    impatient.close()


def test_missing_math_verify_is_said_at_once(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ValueError, match=r"pip install 'rlad\[math\]'"):
        make_verifier("math")


# --- functions of the user's own ------------------------------------------------------------------


@pytest.fixture(scope="module")
def user_verifier():
    verifier = make_verifier("user_verifiers:by_completion", timeout_seconds=1)
    yield verifier
    verifier.close()


@pytest.mark.parametrize(
    ("completion", "verdict", "reward"),
    [
        (" 42 ", CORRECT, 1.0),
        ("41", WRONG, 0.0),
        ("half", WRONG, 0.5),
        ("one", CORRECT, 1.0),
        ("verdict", CORRECT, 1.0),
    ],
)
def test_user_function(user_verifier, completion, verdict, reward):
    judgement = user_verifier.judge(completion, "42")
    assert (judgement.verdict, judgement.reward) == (verdict, reward)


@pytest.mark.parametrize(
    ("completion", "reason"),
    [
        ("no verdict", "the verifier says so"),
        ("hang", "no result within 1 seconds"),
        ("raise", "KeyError: 'no such key'"),
        ("die", "the process died with exit code 3"),
        ("die quietly", "no result within 1 seconds"),
        ("segfault", "the process died with exit code -11"),
        ("exit", "SystemExit: enough"),
        ("interrupt", "KeyboardInterrupt: "),
        ("nothing", "the verifier returned None, not a bool, a number from 0 to 1 or a Verdict"),
        ("text", "the verifier returned 'correct?', not a bool"),
        ("seven", "the verifier returned 7, not a bool"),
        ("nan", "the verifier returned nan, not a bool"),
        ("not picklable", "the verifier returned <function"),
        ("bad repr", "RuntimeError: no repr"),
    ],
)
def test_a_bad_user_function_costs_one_completion(user_verifier, completion, reason):
    judgement = user_verifier.judge(completion, "42")
    assert judgement.verdict == CANNOT_JUDGE and math.isnan(judgement.reward)
    assert judgement.reason.startswith(reason) and len(judgement.reason) <= 200
    assert user_verifier.judge("42", "42").verdict == CORRECT


def test_user_functions_see_the_end_of_long_completions(user_verifier):
    assert user_verifier.judge("x" + " " * 200_000 + "42", "42").verdict == CORRECT
    assert user_verifier.judge("\ud800\x00", "\ud800\x00").verdict == CORRECT


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "user_verifiers:nothing_here",
            r"cannot be used \(AttributeError: .* no attribute 'nothing_here'\); write it as",
        ),
        ("user_verifiers:not_a_function", "TypeError: .* is not a callable object"),
        ("user_verifiers:", "has no attribute ''"),
        (
            "no_such_module:grade",
            r"cannot be used \(ModuleNotFoundError: .*'no_such_module'.*PYTHONPATH",
        ),
        (":grade", "ValueError: Empty module name"),
        (
            "user_verifiers:one_argument",
            r"too many positional arguments\); .* a function\(completion, answer\)",
        ),
        (
            "exakt",
            "unknown verifier 'exakt'; use 'exact', 'number', 'math' or .*; did you mean 'exact'?",
        ),
        ("", "unknown verifier ''; use"),
    ],
)
def test_wrong_names_are_refused_at_once(name, message):
    with pytest.raises(ValueError, match=message):
        make_verifier(name)


def test_import_function():
    assert import_function("user_verifiers:by_completion")("42", "42") is True
