"""Tasks: sources of problems with a verifier. `TASKS` names them, `make_task` builds one.

Nothing heavy is imported until a task is made.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rlad.errors import UserError
from rlad.tasks.base import SPLITS, Judgement, Problem, Split, Task, Verdict, split_of
from rlad.tasks.benchmarks import aime2025, gsm8k
from rlad.tasks.jsonl import JsonlTask
from rlad.tasks.logic import KnightsAndKnaves
from rlad.tasks.reasoning_gym import ReasoningGym, arithmetic, countdown
from rlad.tasks.several import SeveralTasks

__all__ = [
    "SPLITS",
    "TASKS",
    "Judgement",
    "Problem",
    "Split",
    "Task",
    "TaskRow",
    "Verdict",
    "make_task",
    "split_of",
]


@dataclass(frozen=True, slots=True)
class TaskRow:
    """A kind of task and what makes one; `rlad[extra]` installs what it needs."""

    constructor: Callable[..., Task]
    summary: str
    extra: str = ""


TASKS: dict[str, TaskRow] = {
    "knights_and_knaves": TaskRow(
        KnightsAndKnaves,
        "Logic puzzles of 2 to 8 people with exactly one solution, split by structure.",
    ),
    "arithmetic": TaskRow(arithmetic, "Sums and differences of small numbers.", "reasoning-gym"),
    "countdown": TaskRow(
        countdown, "Reach a target with given numbers and + - * /.", "reasoning-gym"
    ),
    "reasoning_gym": TaskRow(
        ReasoningGym, "Any data set of reasoning-gym, by its name.", "reasoning-gym"
    ),
    "jsonl": TaskRow(JsonlTask, "Prompts and answers from a file of your own, with a verifier."),
    "gsm8k": TaskRow(gsm8k, "GSM8K's test set, for evaluation alone.", "benchmarks"),
    "aime2025": TaskRow(aime2025, "AIME 2025, for evaluation alone.", "benchmarks"),
    "several": TaskRow(SeveralTasks, "Problems of several tasks in turn, each graded by its own."),
}


def make_task(type: str, **options: Any) -> Task:
    """Build the task `type` (a name in `TASKS`) with its options.

    Raises `UserError` for an unknown name, and for whatever the task itself refuses.
    """
    if type not in TASKS:
        near = difflib.get_close_matches(type, TASKS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(TASKS)}."
        raise UserError(f"there is no task {type!r}; {hint}")
    return TASKS[type].constructor(**options)
