"""An answer is read whole: what is around it makes another one of it, or nothing that is correct;
how people and models commonly write it changes nothing."""

from collections.abc import Callable

import pytest

from answer_classes import rows
from rlad.tasks.base import Judgement, Problem, Verdict
from rlad.tasks.logic import KnightsAndKnaves
from rlad.tasks.verifiers import exact, number

KNIGHTS = KnightsAndKnaves(num_people=[2])


def _math(completion: str, answer: str) -> Judgement:
    pytest.importorskip("math_verify", reason="needs the optional package math-verify")
    from rlad.tasks.mathematics import judge_math

    return judge_math(completion, answer)


def _knights(completion: str, answer: str) -> Judgement:
    metadata = {"names": ["Ada", "Ben"], "world": [True, False], "num_people": 2}
    return KNIGHTS.judge(Problem("", answer, "", metadata=metadata), completion)


JUDGES: dict[str, Callable[[str, str], Judgement]] = {
    "number": number,
    "math": _math,
    "exact": exact,
    "knights": _knights,
}


@pytest.mark.parametrize("name", JUDGES)
def test_whole_answers(name):
    """Lines of `whole_answers.txt`: verifiers, `correct` or `not`, reference, completion."""
    for names, verdict, answer, completion in rows("whole_answers.txt"):
        if name in names.split():
            judgement = JUDGES[name](completion.replace("\u21b5", "\n"), answer)
            is_correct = judgement.verdict == Verdict.CORRECT
            assert is_correct == (verdict == "correct"), (completion, answer, judgement)
