import math
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from answer_classes import rows
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
        # the marker in markdown, and inside another word
        ("**Answer**: Oslo", "Oslo", CORRECT),
        ("*Answer*: *Oslo*", "Oslo", CORRECT),
        ("***Answer***: ***Oslo***", "Oslo", CORRECT),
        ("__Answer:__ Oslo", "Oslo", CORRECT),
        ("Answer : Oslo", "Oslo", CORRECT),
        ("Answer\N{FULLWIDTH COLON} Oslo", "Oslo", CORRECT),
        ("Answer: Rome? No.\n**Answer**: Oslo", "Oslo", CORRECT),
        ("Answer: Rome? No.\n**Answer**: Oslo", "Rome", WRONG),
        ("Answer: Rome? No.", "Rome", WRONG),
        ("A counteranswer: Oslo", "Oslo", WRONG),
        ("**Answer**: Oslo\n\nI hope that this helps.", "Oslo", CORRECT),
        ("Answer: Oslo\nIt is the capital.", "Oslo", CORRECT),
        ("Answer:\n1 2\n3 4", "1 2\n3 4", CORRECT),
        ("Answer:\n1 2\n3 4", "1 2", CORRECT),
        # boxes and what LaTeX needs to set a text
        ("So \\boxed{Oslo}.", "Oslo", CORRECT),
        ("So \\boxed{Oslo}.\nThat took 3 steps.", "Oslo", CORRECT),
        (r"So \boxed{\text{Oslo}}.", "Oslo", CORRECT),
        (r"So $\boxed{Rome}$, not Oslo", "Oslo", WRONG),
        ("Oslo", r"\text{Oslo}", CORRECT),
        # answers in thoughts
        ("<think><answer>Paris</answer>?</think> I do not know.", "Paris", WRONG),
        ("<think>Rome?</think> Paris", "Paris", CORRECT),
        ("<think>Paris", "Paris", WRONG),
        # composed and decomposed letters
        ("cafe\N{COMBINING ACUTE ACCENT}", "caf\N{LATIN SMALL LETTER E WITH ACUTE}", CORRECT),
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
        ("<answer>18</answer> and so on", "It is 9 * 2.\n#### 18", CORRECT),
        ("<answer>18</answer> and 19", "It is 9 * 2.\n#### 18", WRONG),
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
        ("**Answer**: 12\n\nThat took 3 steps.", "12", CORRECT),
        ("**Answer**: 12\n\nThat took 3 steps.", "3", WRONG),
        ("Answer: 12\nThat took 3 steps.", "3", WRONG),
        # never a number from elsewhere
        ("It is 18.\nAnswer: what I said", "18", WRONG),
        ("It is 42, or not.\nAnswer: unknown", "42", WRONG),
        ("There are 7 people. <answer>none of them</answer>", "7", WRONG),
        ("I tried 5 and 6.\nAnswer: I give up.", "6", WRONG),
        ("<think>9?</think> <answer>no idea</answer>", "9", WRONG),
        ("It is 9.\nI hope that this helps.", "9", WRONG),
        (r"It is 9, so \boxed{\text{unknown}}", "9", WRONG),
        (r"It is 9, so \boxed{}", "9", WRONG),
        # a closed box is the answer
        ("So \\boxed{42}.\nThat took 3 steps.", "42", CORRECT),
        ("So \\boxed{7}.\nThat took 42 steps.", "42", WRONG),
        (r"\boxed{42} by step 7", "42", CORRECT),
        (r"\boxed{42} by step 7", "7", WRONG),
        (r"<answer>\boxed{42}, see step 3</answer>", "42", CORRECT),
        (r"<answer>\boxed{42}, see step 3</answer>", "3", WRONG),
        (r"\boxed{7=42}", "42", WRONG),
        (r"\boxed{6 \cdot 7=42}", "42", CORRECT),
        # never a fragment
        (r"So \boxed{$9{,}500}", "9500", CORRECT),
        (r"So \boxed{9{,}500}", "500", WRONG),
        ("1,00,000 rupees", "0", WRONG),
        ("1,00,000 rupees", "100000", CORRECT),
        (r"\boxed{\frac{3}{4}}", "0.75", CORRECT),
        ("Answer: 4", r"\frac{3}{4}", WRONG),
        ("Answer: 3 1/2", "3.5", CORRECT),
        ("Answer: 3 1/2", "2", WRONG),
        ("Answer: 1.5 x 10^3", "3", WRONG),
        ("Answer: 1.5 x 10^3", "1500", CORRECT),
        ("Answer: 9:30", "10:30", WRONG),
        ("Answer: 9:30", "9:30", CORRECT),
        ("Answer: 9:30", "30", WRONG),
        ("Answer: (3, 4)", "(2, 4)", WRONG),
        ("Answer: (3, 4)", "(3,4)", CORRECT),
        ("Answer: (3, 4)", "4", WRONG),
        ("Answer: 2024-05-01", "1", WRONG),
        ("Answer: 2024-05-01", "2024-05-01", CORRECT),
        ("Answer: 5/1/2024", "10/2/2024", WRONG),
        (r"Answer: 3\sqrt{2}", "2", WRONG),
        ("Answer: 41 or 42", "42", WRONG),
        ("Answer: 3 and a half", "3", WRONG),
        ("Answer: minus 5", "5", WRONG),
        # amounts
        ("Answer: $20, not $30", "20", CORRECT),
        ("Answer: $20, not $30", "30", WRONG),
        ("Answer: US$1,234.50", "1234.5", CORRECT),
        ("Answer: US$1,234.50", "50", WRONG),
        ("Answer: 5 dollars", "$5", CORRECT),
        ("Answer: 500 cents", "$5", CORRECT),
        ("Answer: 5 euros", "$5", WRONG),
        ("Answer: 6 days", "6 hours", WRONG),
        ("Answer: 6 hours", "6", CORRECT),
        # references that are no plain number
        (r"3\sqrt{3}", r"3\sqrt{3}", CANNOT_JUDGE),
        ("5", r"(-\infty, 5]", CANNOT_JUDGE),
        ("5", "between 5 and 10", CANNOT_JUDGE),
        ("3", "5 - 2 apples", CANNOT_JUDGE),
        # answers in thoughts
        (r"<think> so \boxed{42}, or not </think>", "42", WRONG),
        ("<think> first it is 42", "42", WRONG),
        ("<think> 7? </think> 42", "42", CORRECT),
        ("7? </think> 42", "42", CORRECT),
    ],
)
def test_number(completion, answer, verdict):
    assert number(completion, answer).verdict == verdict


@pytest.mark.parametrize("verifier", [exact, number], ids=lambda verifier: verifier.__name__)
def test_many_more_cases(verifier):
    """Lines of `tests/NAME_cases.txt`: verdict, reference, completion."""
    for verdict, answer, completion in rows(f"{verifier.__name__}_cases.txt"):
        judgement = verifier(completion.replace("\u21b5", "\n"), answer)
        assert judgement.verdict == verdict, (completion, answer, judgement)


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
        ("<think> $3$ </think> I do not know.", "3", WRONG),
        ("no idea", "3", WRONG),
        ("", "3", WRONG),
        ("3", "", CANNOT_JUDGE),
    ],
)
def test_math(math_verifier, completion, answer, verdict):
    judgement = math_verifier.judge(completion, answer)
    assert judgement.verdict == verdict, judgement


def test_math_reads_no_endless_text():
    verifier = make_verifier("math", timeout_seconds=3)
    started = time.monotonic()
    for text in ("(" * 2000, "9^" * 300 + "9", r"\sqrt{" * 300, "((999!)!)!", "1" * 100_000):
        assert verifier.judge(f"<answer>{text}</answer>", "3").verdict == CANNOT_JUDGE
    assert verifier.judge(r"\boxed{3}", "3").verdict == CORRECT
    verifier.close()
    assert time.monotonic() - started < 20


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
        # sums of floats that miss a bound by rounding
        ("three parts", CORRECT, 1.0),
        ("ten parts", CORRECT, 1.0),
        ("a little more", CORRECT, 1.0),
        ("a little less than nothing", WRONG, 0.0),
        ("nearly", WRONG, 0.999999),
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
        ("too much", "the verifier returned 1.000001, not a bool"),
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
