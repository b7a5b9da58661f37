"""Ask the teacher a second time for missing log-probs, then stop the run. Used by all engines."""

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
    """Return the log-probs of the completions, with at most `max_missing_share` of them not finite.

    `answers` are the answers to an earlier `submit`. Raises `RunFailedError` if too many log-probs
    are missing even after a second request.
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
    """Return the log-probs of the completions. If too many are missing, completions with a missing
    token are scored once more."""
    if answers is None:
        answers = teacher.submit(requests)
    logprobs = [answer.result() for answer in answers]
    num_missing, num_tokens = count_missing(logprobs, requests)
    if num_missing <= max_missing_share * num_tokens:
        return logprobs
    # Log-probs from the first answer are kept; only missing ones are filled from the second.
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
    """Raise `RunFailedError` if more than this share of the tokens has no finite log-prob."""
    if num_missing <= max_missing_share * num_tokens:
        return
    again = ", also when asked again" if asked_again else ""
    raise RunFailedError(
        f"step {step}: the teacher gave no finite log-prob for {num_missing / num_tokens:.1%} of "
        f"the tokens{again}; max_missing_teacher_share allows "
        f"{max_missing_share:.1%}. Check that it is the right model, that its answers are "
        "complete, and that it does not overflow (dtype = bfloat16 instead of float16), then "
        "resume the run."
    )


def count_missing(
    logprobs: Sequence[Tensor], requests: Sequence[TeacherRequest]
) -> tuple[int, int]:
    """Count the student's tokens without a finite log-prob, and all of the student's tokens."""
    asked = [of_actions(*pair) for pair in zip(logprobs, requests, strict=True)]
    num_missing = sum(int((~values.isfinite()).sum()) for values in asked)
    return num_missing, sum(map(len, asked))


def of_actions(values: Tensor, request: TeacherRequest) -> Tensor:
    """Select the values of the tokens that the model wrote."""
    return values if request.actions is None else values[torch.tensor(request.actions)]
