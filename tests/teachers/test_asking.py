"""Ask the teacher twice, then stop."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from rlad.errors import RunFailedError
from rlad.teachers.asking import complete_logprobs
from rlad.teachers.base import Answer, SynchronousTeacher, TeacherRequest

REQUESTS = [TeacherRequest([1], [2, 3]), TeacherRequest([1], [4, 5]), TeacherRequest([1], [6, 7])]


class Forgetful(SynchronousTeacher):
    """Answers with the number of the call; in the first `num_bad` calls not for some tokens."""

    identity = "forgetful"

    def __init__(self, *missing: int, num_bad: int):
        self.missing = missing
        self.num_bad = num_bad
        self.asked: list[Sequence[TeacherRequest]] = []

    def logprobs(self, requests: Sequence[TeacherRequest]) -> list[Tensor]:
        self.asked.append(requests)
        missing = self.missing if len(self.asked) <= self.num_bad else ()
        number = -float(len(self.asked))
        return [
            torch.tensor([torch.nan if token in missing else number for token in one.completion])
            for one in requests
        ]


def complete(teacher: Forgetful, most: float, answers: list[Answer] | None = None) -> list[Tensor]:
    return complete_logprobs(teacher, REQUESTS, max_missing_share=most, step=3, answers=answers)


def test_a_few_missing_tokens_are_borne():
    teacher = Forgetful(3, num_bad=9)
    values = torch.stack(complete(teacher, 1 / 6))
    assert values.isnan().tolist() == [[False, True], [False, False], [False, False]]
    assert teacher.asked == [REQUESTS]


@pytest.mark.parametrize("is_asked_before", [False, True])
def test_only_what_lacks_a_token_is_asked_for_again_and_only_that_token_is_filled(is_asked_before):
    teacher = Forgetful(3, 6, num_bad=1)
    answers = teacher.submit(REQUESTS) if is_asked_before else None
    values = torch.stack(complete(teacher, 0.1, answers))
    assert values.tolist() == [[-1, -2], [-1, -1], [-2, -1]]
    assert teacher.asked == [REQUESTS, [REQUESTS[0], REQUESTS[2]]]


def test_too_many_stop_the_run():
    sentence = (
        r"^step 3: the teacher gave no finite log-prob for 50\.0% of the tokens, also when asked "
        r"again; max_missing_teacher_share allows 33\.0%\. Check"
    )
    with pytest.raises(RunFailedError, match=sentence):
        complete(Forgetful(2, 4, 6, num_bad=9), 0.33)
