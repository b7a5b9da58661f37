"""Check whether a context can show what its settings ask for, from some problems and the task's
rewards."""

from collections.abc import Iterator, Sequence

from rlad.config.context import ContextConfig
from rlad.findings import Finding
from rlad.tasks import Problem
from rlad.tasks.base import SOLUTION
from rlad.teachers.contexts import metadata_texts, reference_block


def check_context(
    settings: ContextConfig,
    problems: Sequence[Problem],
    group_size: int,
    rewards: tuple[float, float],
) -> Iterator[Finding]:
    """Report whether the problems have what the context should show. `rewards` are the task's
    smallest and largest."""
    kinds = ["skill", "answer", "feedback"]
    if any(SOLUTION in metadata_texts(problem) for problem in problems):
        kinds.append("solution")
    shown = [name for name in kinds if getattr(settings, name)]
    yield from _check_rewards(settings, rewards)
    for name in settings.fields:
        num_empty = sum(not metadata_texts(problem).get(name) for problem in problems)
        if num_empty == len(problems):
            known = sorted({key for problem in problems for key in metadata_texts(problem)})
            yield Finding(
                "error",
                "context",
                f"it shows the field {name!r}, which the task's problems do not have; use "
                f"{', '.join(known) or 'num_successes or answer, as they have none'}.",
            )
        elif num_empty:
            message = f"{num_empty} of {len(problems)} problems have no {name!r}"
            yield Finding("warning", "context", message)
        shown.append(name)
    if settings.answer or settings.solution:
        yield from _check_answers(settings, problems)
    for number, what in (
        (settings.num_successes, "correct"),
        (settings.num_failures, "wrong"),
    ):
        if number:
            shown.append(f"up to {number} {what} of the other {group_size - 1} completions")
    if settings.num_peers >= group_size:
        yield Finding(
            "warning",
            "context",
            f"it wants {settings.num_peers} other completions, but a group has only "
            f"{group_size - 1} others (rollout.group_size)",
        )
    yield Finding("ok", "context", f"shows the question with {', '.join(shown)}")


def _check_rewards(settings: ContextConfig, rewards: tuple[float, float]) -> Iterator[Finding]:
    """Report whether rewards can be high, or low, enough for a completion to be shown."""
    least, greatest = rewards
    if settings.num_peers + settings.feedback and settings.success_reward > greatest:
        yield Finding(
            "error",
            "context",
            f"success_reward is {settings.success_reward:g}, but the task's rewards are at most "
            f"{greatest:g}, so no completion is ever correct; lower it.",
        )
    if settings.failure_reward is not None and settings.failure_reward < least:
        yield Finding(
            "error",
            "context",
            f"failure_reward is {settings.failure_reward:g}, but the task's rewards are at least "
            f"{least:g}, so no completion is ever wrong; raise it, or leave it out.",
        )


def _check_answers(settings: ContextConfig, problems: Sequence[Problem]) -> Iterator[Finding]:
    """Report how many problems have no answer, or no solution, to show."""
    num_empty = sum(reference_block(settings, one) is None for one in problems)
    what = "answer" if settings.answer else "solution"
    if num_empty == len(problems):
        yield Finding(
            "error",
            "context",
            f"it shows the reference {what}, which none of the {num_empty} problems looked at has; "
            f"leave {what} out and show something else, such as num_successes = 1.",
        )
    elif num_empty:
        message = f"{num_empty} of {len(problems)} problems have no reference {what}"
        yield Finding("warning", "context", message)
