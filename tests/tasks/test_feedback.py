"""What a verifier says of a wrong completion: true, and never the right answer."""

import itertools
from pathlib import Path

import pytest

from rlad.tasks import make_task
from rlad.tasks.base import MAX_FEEDBACK_CHARACTERS
from rlad.tasks.logic import ROLES, Claim, KnightsAndKnaves, Statement, puzzle_of, what_is_wrong
from rlad.tasks.reasoning_gym import _what_is_wrong
from rlad.tasks.verifiers import make_verifier


def test_a_puzzle_by_hand() -> None:
    """Ada says that Ben is a knave, Ben says that both are knaves: Ada is the knight."""
    puzzle = (
        Statement("is", (Claim(1, False),)),
        Statement("and", (Claim(0, False), Claim(1, False))),
    )
    names = ["Ada", "Ben"]
    for roles, feedback in (
        ({"ada": True, "ben": False}, ""),
        (
            {"ada": True, "ben": True},
            "By this answer Ada is a knight, but what Ada says would then be false.",
        ),
        (
            {"ada": False, "ben": False},
            "By this answer Ada is a knave, but what Ada says would then be true.",
        ),
        ({"ada": True}, "The answer gives Ben no role."),
        (
            {"ada": True, "ben": False, "eve": True},
            "The answer names somebody who is not in the puzzle.",
        ),
        (None, "No answer could be read: each person needs one role, after 'Answer:'."),
    ):
        assert what_is_wrong(puzzle, names, roles) == feedback


@pytest.mark.parametrize("reward", ["exact", "logic_rl"])
def test_every_wrong_world_is_told_a_contradiction(reward: str) -> None:
    task = KnightsAndKnaves(num_people=(2, 3, 4), reward=reward)
    for index in range(9):
        problem = task.problem("train", index)
        names, puzzle = problem.metadata["names"], puzzle_of(problem)
        for world in itertools.product((True, False), repeat=len(names)):
            said = ", ".join(f"{n} is a {ROLES[r]}" for n, r in zip(names, world, strict=True))
            text = f"<think> x </think><answer> {said} </answer>"
            judgement = task.judge(problem, text)
            if list(world) == problem.metadata["world"]:
                assert judgement.feedback == ""
                continue
            name = judgement.feedback.split()[3]
            i = names.index(name)
            holds = puzzle[i].holds(world)
            assert holds != world[i]
            assert judgement.feedback.endswith(f"would then be {str(holds).lower()}.")
            assert problem.answer not in judgement.feedback


def test_countdown_by_hand() -> None:
    for answer, feedback in (
        ("3 + 5", "It uses the numbers 3, 5, not each of 3, 5, 7 once."),
        ("3 * 5 + 7", "It comes to 22, not to 26."),
        ("7 / 3 + 5", "It comes to 22/3, not to 26."),
        ("import os", "No expression of whole numbers, + - * / and parentheses could be read."),
    ):
        assert _what_is_wrong(answer, {"numbers": [7, 3, 5], "target": 26}) == feedback


def test_countdown_says_it_of_a_completion() -> None:
    pytest.importorskip("reasoning_gym", reason="the task's data sets")
    task = make_task("countdown")
    problem = task.problem("train", 0)
    wrong = task.judge(problem, "<answer>1 + 1</answer>")
    assert wrong.feedback.startswith("It uses the numbers 1, 1, not each of ")
    assert task.judge(problem, f"<answer>{problem.answer}</answer>").feedback == ""
    task.close()


@pytest.mark.parametrize(
    ("name", "completion", "feedback"),
    [
        ("number", "so\nAnswer: 41", "The final answer is wrong."),
        ("number", "at last it must be 41", "The final answer is wrong."),
        ("exact", "so\n<answer> no </answer>", "The final answer is wrong."),
        ("number", "", "No final answer could be read."),
        ("number", "Answer: 42", ""),
    ],
)
def test_verifiers_quote_nothing(name: str, completion: str, feedback: str) -> None:
    judgement = make_verifier(name).judge(completion, "42")
    assert judgement.feedback == feedback and "42" not in judgement.feedback


def test_maths_quotes_nothing() -> None:
    pytest.importorskip("math_verify", reason="the verifier 'math'")
    verifier = make_verifier("math")
    wrong = verifier.judge(r"so \boxed{\frac{1}{2}}", r"\frac{1}{3}")
    assert wrong.feedback == "The final answer is wrong."
    assert verifier.judge(r"\boxed{\frac{1}{3}}", "1/3").feedback == ""
    verifier.close()


def test_a_verifier_of_your_own_may_give_feedback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "telling.py").write_text(
        "def judge(completion, answer):\n"
        "    if completion == 'bare':\n"
        "        return 0.5\n"
        "    return completion == answer, 'line 3: ' + 9999 * 'x'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    verifier = make_verifier("telling:judge")
    wrong = verifier.judge("no", "yes")
    assert wrong.reward == 0 and wrong.feedback.startswith("line 3: xxx")
    assert len(wrong.feedback) == MAX_FEEDBACK_CHARACTERS
    right = verifier.judge("yes", "yes")
    assert right.reward == 1 and right.feedback == ""
    assert verifier.judge("bare", "yes").feedback == ""
    verifier.close()
