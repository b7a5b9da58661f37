"""Ask the teacher twice, then stop: what every engine does about log-probs that are missing."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rlad.errors import RunFailedError
from rlad.teachers.base import Answer, Teacher, TeacherRequest


def complete_logprobs(
    teacher: Teacher,
    requests: Sequence[TeacherRequest],
    *,
    max_missing_share: float,
    step: int,
    answers: Sequence[Answer] | None = None,
) -> list[Tensor]:
    """The log-probs of the completions, of which at most `max_missing_share` of the tokens are not
    finite.

    `answers` are those of a teacher that was asked before. Raises `RunFailedError` when too many
    are missing after asking again too.
    """
    logprobs = ask_twice(teacher, requests, max_missing_share=max_missing_share, answers=answers)
    require_few_missing(
        *count_missing(logprobs, requests), max_missing_share=max_missing_share, step=step
    )
    return logprobs


def ask_twice(
    teacher: Teacher,
    requests: Sequence[TeacherRequest],
    *,
    max_missing_share: float,
    answers: Sequence[Answer] | None = None,
) -> list[Tensor]:
    """The log-probs of the completions. Where too many are missing, those with a missing token are
    asked for once more."""
    if answers is None:
        answers = teacher.submit(requests)
    logprobs = [answer.result() for answer in answers]
    num_missing, num_tokens = count_missing(logprobs, requests)
    if num_missing <= max_missing_share * num_tokens:
        return logprobs
    # Tokens that the first answer has are kept, and the others are filled from the second one.
    again = [
        i
        for i, (values, request) in enumerate(zip(logprobs, requests, strict=True))
        if not of_actions(values, request).isfinite().all()
    ]
    for i, values in zip(again, teacher.logprobs([requests[i] for i in again]), strict=True):
        logprobs[i] = torch.where(logprobs[i].isfinite(), logprobs[i], values)
    return logprobs


def require_few_missing(
    num_missing: int,
    num_tokens: int,
    *,
    max_missing_share: float,
    step: int,
    asked_again: bool = True,
) -> None:
    """Raise `RunFailedError` when more than that share of the tokens has no finite log-prob."""
    if num_missing <= max_missing_share * num_tokens:
        return
    again = ", also when asked again" if asked_again else ""
    raise RunFailedError(
        f"step {step}: the teacher gave no finite log-prob for {num_missing / num_tokens:.1%} of "
        f"the tokens{again}; max_missing_teacher_share allows "
        f"{max_missing_share:.1%}. Check that it is the right model, answers in full, and does not "
        "overflow (dtype = bfloat16 instead of float16), then resume the run."
    )


def count_missing(
    logprobs: Sequence[Tensor], requests: Sequence[TeacherRequest]
) -> tuple[int, int]:
    """Count the tokens of the student without a finite log-prob, and all of them."""
    asked = [of_actions(*pair) for pair in zip(logprobs, requests, strict=True)]
    num_missing = sum(int((~values.isfinite()).sum()) for values in asked)
    return num_missing, sum(map(len, asked))


def of_actions(values: Tensor, request: TeacherRequest) -> Tensor:
    """Select of values for each token those of the tokens that the model wrote."""
    return values if request.actions is None else values[torch.tensor(request.actions)]
