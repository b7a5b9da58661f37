"""Tasks: sources of problems with a verifier. `TASKS` maps each name to its constructor; the config
documents them. Nothing heavy is imported until a task is made."""

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

from pydantic import Field

from rlad.config.task import TaskConfig
from rlad.config.types import Section
from rlad.config.validation import validated
from rlad.tasks.base import SPLITS, Judgement, Problem, Split, Task, Verdict, split_of
from rlad.tasks.benchmarks import Benchmark
from rlad.tasks.environment import EnvironmentTask
from rlad.tasks.games.island_questions import IslandQuestions
from rlad.tasks.games.sokoban import Sokoban
from rlad.tasks.jsonl import JsonlTask
from rlad.tasks.logic import KnightsAndKnaves
from rlad.tasks.reasoning_gym import ReasoningGym, arithmetic, countdown
from rlad.tasks.scenes import Scenes
from rlad.tasks.several import SeveralTasks

__all__ = [
    "SPLITS",
    "TASKS",
    "Judgement",
    "Problem",
    "Split",
    "Task",
    "Verdict",
    "make_task",
    "split_of",
]

TASKS: dict[str, Callable[..., Task]] = {
    "knights_and_knaves": KnightsAndKnaves,
    "arithmetic": arithmetic,
    "countdown": countdown,
    "reasoning_gym": ReasoningGym,
    "jsonl": JsonlTask,
    "scenes": Scenes,
    "gsm8k": partial(Benchmark, "gsm8k"),
    "aime2025": partial(Benchmark, "aime2025"),
    "several": SeveralTasks,
    "environment": EnvironmentTask,
    "sokoban": Sokoban,
    "island_questions": IslandQuestions,
}


class _Table(Section):
    task: Annotated[TaskConfig, Field(discriminator="type")]


def make_task(type: str, **options: Any) -> Task:
    """Build the task `type` (a name in `TASKS`) with its options. Raises `UserError` for an unknown
    name or option, and for what the task itself refuses."""
    section = validated(_Table, {"task": {"type": type} | options}).task
    return TASKS[type](**section.model_dump(exclude={"type"}))
