import math
import os
import subprocess
import sys

import pytest

from rlad.tasks.base import SPLITS, Problem, Verdict, split_of, text_key
from rlad.tasks.reasoning_gym import ReasoningGym, arithmetic, countdown
from rlad.tasks.written_numbers import evaluate_arithmetic

pytest.importorskip("reasoning_gym", reason="needs the optional package reasoning-gym")
pytestmark = pytest.mark.reasoning_gym

CORRECT = Verdict.CORRECT
WRONG = Verdict.WRONG
CANNOT_JUDGE = Verdict.CANNOT_JUDGE


@pytest.fixture
def close_later():
    tasks = []
    yield lambda task: tasks.append(task) or task
    for task in tasks:
        task.close()


def test_arithmetic_problems_say_the_truth(close_later):
    task = close_later(arithmetic())
    for index in range(50):
        problem = task.problem("train", index)
        expression = problem.prompt.split(": ")[1].split(" =")[0]
        value, numbers = evaluate_arithmetic(expression)
        assert str(value) == problem.answer
        assert 2 <= len(numbers) <= 4 and max(numbers) <= 99
    assert task.judge(problem, f"hm\n<answer>{problem.answer}</answer>").reward == 1
    assert task.judge(problem, f"Answer: **{problem.answer}.0**").verdict == CORRECT
    assert task.judge(problem, "<answer>1000</answer>").reward == 0
    assert task.judge(problem, "").verdict == WRONG


def test_no_question_is_in_two_splits():
    for task, num in ((arithmetic(), 400), (countdown(), 40)):
        keys = {split: {task.problem(split, index).key for index in range(num)} for split in SPLITS}
        assert not keys["train"] & keys["validation"] and not keys["train"] & keys["test"]
        assert not keys["validation"] & keys["test"]
        for split in SPLITS:
            assert {split_of(key) for key in keys[split]} == {split}


def test_a_problem_is_a_function_of_its_arguments_even_in_another_process():
    show = (
        "from rlad.tasks.reasoning_gym import *; t = ReasoningGym('knights_knaves', {'n_people': "
        "3}); " + ("print([t.problem('test', i, seed=2).key for i in (4, 0)])")
    )
    task = ReasoningGym("knights_knaves", {"n_people": 3})
    expected = [task.problem("test", i, seed=2).key for i in (4, 0)]
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", show], capture_output=True, text=True, check=True
    ).stdout
    assert found.splitlines()[-1] == str(expected)
    assert task.problem("test", 4, seed=3).key != expected[0]


def test_seeds_do_not_overlap():
    # Data sets of reasoning-gym with seeds 1 and 2 share all items but one; these must not.
    task = arithmetic({"min_digits": 4, "max_digits": 4})
    first, second = (
        {task.problem("train", i, seed=seed).prompt for i in range(100)} for seed in (1, 2)
    )
    assert len(first) == len(second) == 100
    assert not first & second


def test_dollars_and_a_remark_are_no_part_of_an_answer(close_later):
    task = close_later(arithmetic())
    problem = task.problem("train", 0)
    written = ("<answer>${}$</answer>", "Answer: {}\n\nBye", "Answer: {}1", "Answer: {}\nNo, 7.")
    verdicts = [task.judge(problem, text.format(problem.answer)).verdict for text in written]
    assert verdicts == [Verdict.CORRECT, Verdict.CORRECT, Verdict.WRONG, Verdict.WRONG]


def test_countdown_is_judged_without_evaluating_the_answer(close_later):
    task = close_later(countdown())
    for index in range(20):
        problem = task.problem("train", index)
        assert task.judge(problem, f"<answer>{problem.answer}</answer>").verdict == CORRECT
    problem = Problem(
        "",
        "",
        "",
        metadata={"entry": {"answer": "", "metadata": {"numbers": [3, 5, 8], "target": 64}}},
    )
    for answer, verdict in (
        ("(3 + 5) * 8", CORRECT),
        ("8 * (5 + 3)", CORRECT),
        ("8 * 8", WRONG),  # not the given numbers
        ("64", WRONG),
        ("3 * 5 + 8", WRONG),
        ("(3 + 5) * 8 = 64", WRONG),
        ("__import__('os')._exit(1) or (3 + 5) * 8", WRONG),
        ("9**9**9**9**9", WRONG),
    ):
        assert task.judge(problem, f"<answer>{answer}</answer>").verdict == verdict


def test_puzzle24_needs_the_given_numbers():
    task = ReasoningGym("puzzle24")
    problem = task.problem("train", 0)
    assert task.judge(problem, f"Answer: {problem.answer}").verdict == CORRECT
    assert sorted(problem.metadata["entry"]["metadata"]["numbers"]) != [1, 2, 3, 4]
    assert (
        task.judge(problem, "Answer: 1 * 2 * 3 * 4").verdict == WRONG
    )  # reasoning-gym itself gives this 1.0


def test_partial_credit_is_no_success(close_later):
    options = {"n_people": 2}
    strict = close_later(ReasoningGym("knights_knaves", options))
    problem = strict.problem("train", 0)
    metadata = problem.metadata["entry"]["metadata"]
    role = metadata["knight_knave_terms"]
    truth = [role["knight"] if is_knight else role["knave"] for is_knight in metadata["solution"]]
    lie = role["knave"] if truth[1] == role["knight"] else role["knight"]
    first, second = metadata["names"]
    half = f"{first} is a {truth[0]}, and {second} is a {lie}."
    assert (
        strict.judge(
            problem,
            f"<answer>**{first}** is a {truth[0]}, and {second} is a {truth[1]}.**</answer>",
        ).reward
        == 1
    )
    assert (strict.judge(problem, half).verdict, strict.judge(problem, half).reward) == (WRONG, 0)
    partial = close_later(ReasoningGym("knights_knaves", options, partial_credit=True))
    judgement = partial.judge(problem, half)
    assert judgement.verdict == WRONG
    assert judgement.reward == pytest.approx(0.3 + 0.7 * 1 / 2)  # the scorer's own rule


def test_equal_puzzles_with_other_names_share_a_key():
    task = ReasoningGym("knights_knaves", {"n_people": 2})
    problem = task.problem("train", 0)
    same = [p for i in range(1, 400) if (p := task.problem("train", i)).key == problem.key]
    assert same and any(p.prompt != problem.prompt for p in same)
    assert all(
        p.metadata["entry"]["metadata"]["statements"]
        == problem.metadata["entry"]["metadata"]["statements"]
        for p in same
    )


@pytest.mark.parametrize("dataset", ["simple_integration", "spiral_matrix", "string_insertion"])
def test_answers_that_could_do_harm_are_not_evaluated(dataset, tmp_path, close_later):
    trace = tmp_path / "trace"
    task = close_later(ReasoningGym(dataset))
    problem = task.problem("train", 0)
    assert task.judge(problem, f"<answer>{problem.answer}</answer>").verdict == CORRECT
    for answer in (
        f"open({str(trace)!r}, 'w')",
        f"[open({str(trace)!r}, 'w')]",
        "x.__class__",
        "[0] * 9999999",
        "\uff45val(1)",
    ):
        judgement = task.judge(problem, f"<answer>{answer}</answer>")
        assert (judgement.verdict, judgement.reward) == (WRONG, 0)
    assert not trace.exists()


def test_formulas_in_another_form_still_count(close_later):
    task = close_later(ReasoningGym("simple_integration"))
    problem = task.problem("train", 0)
    constant_first = "C + 0.5*" + f"({problem.answer.removesuffix(' + C')})*2"
    assert task.judge(problem, f"<answer>{constant_first}</answer>").verdict == CORRECT


def test_scorers_that_raise_and_data_without_answers_cannot_judge(close_later):
    task = close_later(ReasoningGym("prime_factorization"))
    problem = task.problem("train", 0)
    judgement = task.judge(problem, "Answer: no idea")
    assert judgement.verdict == CANNOT_JUDGE and math.isnan(judgement.reward)
    assert judgement.reason.startswith(
        "scorer of 'prime_factorization': ValueError: invalid literal"
    )
    assert task.judge(problem, f"Answer: {problem.answer}").verdict == CORRECT
    task = ReasoningGym("propositional_logic")
    problem = task.problem("train", 0)
    assert problem.answer == ""
    assert (
        task.judge(problem, "Answer: P").reason
        == "the data set 'propositional_logic' has no reference answers"
    )


def test_keys_are_the_normalised_question_and_instructions_can_be_left_out():
    bare = arithmetic(instructions=False).problem("test", 0)
    asked = arithmetic().problem("test", 0)
    assert bare.key == asked.key == text_key(bare.prompt)
    assert (
        asked.prompt.startswith(bare.prompt)
        and "<answer>" in asked.prompt
        and "<answer>" not in bare.prompt
    )


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        ("chain_sun", {}, "reasoning-gym has no data set 'chain_sun'; did you mean 'chain_sum'"),
        (".", {}, "reasoning-gym has no data set '.'; the names are: ab, acre, "),
        (
            "chain_sum",
            {"min_term": 3},
            "data set 'chain_sum' has no option 'min_term'; did you mean 'min_terms'?",
        ),
        (
            "chain_sum",
            {"seed": 3},
            "data set 'chain_sum' has no option 'seed'; use allow_negation, max_digits, max_terms",
        ),
        (
            "chain_sum",
            {"min_terms": 9, "max_terms": 3},
            "gives no train problem .AssertionError: max_terms must be >= min_terms.; choose other "
            "options",
        ),
        ("chain_sum", {"min_terms": "x"}, "gives no train problem .TypeError"),
        (
            "knights_knaves",
            {"n_people": 2, "depth_constraint": 1},
            "gives no train problem .IndexError",
        ),
    ],
)
def test_wrong_names_and_options_are_refused(dataset, options, message):
    with pytest.raises(ValueError, match=message):
        ReasoningGym(dataset, options)


def test_data_sets_with_too_few_problems_are_refused():
    # The questions are the ten digits, which do not reach every split.
    task = arithmetic({"min_terms": 1, "max_terms": 1, "max_digits": 1})
    empty = {
        split_of(text_key(f"State the final answer to the following arithmetic problem: {n} ="))
        for n in range(10)
    }
    (missing,) = set(SPLITS) - empty
    with pytest.raises(
        ValueError,
        match=f"gives no {missing} problem .it has too few different problems.; choose",
    ):
        task.problem(missing, 0)


def test_data_sets_that_depend_on_the_hash_seed_need_a_fixed_one(monkeypatch):
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    with pytest.raises(ValueError, match="set the environment variable PYTHONHASHSEED=0"):
        ReasoningGym("word_ladder")
    monkeypatch.setitem(os.environ, "PYTHONHASHSEED", "0")
    assert ReasoningGym("ransom_note").problem("train", 0).answer in ("True", "False")


def test_missing_package_is_said_at_once(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ValueError, match=r"pip install 'rlad\[reasoning-gym\]'"):
        arithmetic()
