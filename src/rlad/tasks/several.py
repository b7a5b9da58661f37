"""Several tasks in one run: their problems alternate, and each is graded by its own task."""

from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import Any

from rlad.errors import UserError
from rlad.tasks.base import Judgement, Problem, Split, Task, reward_range


class SeveralTasks:
    """A task made of k tasks. Its problem i is problem i // k of task i % k, the same as in that
    task.

    `tasks` maps names to types and options. The name is the problem's `task` and precedes its
    `difficulty`, so that evaluation tables show each task.
    """

    def __init__(self, tasks: Mapping[str, Mapping[str, Any]]) -> None:
        from rlad.tasks import make_task  # its table contains this class

        self.tasks: dict[str, Task] = {}
        # If a task cannot be made, the worker processes of those before it must end.
        with ExitStack() as made:
            for name, options in tasks.items():
                try:
                    self.tasks[name] = made.enter_context(closing(make_task(**options)))
                except UserError as error:
                    raise UserError(f"task {name!r}: {error}") from None
            self._held = made.pop_all()
        self.name = f"several ({', '.join(self.tasks)})"
        self._names = list(self.tasks)
        ranges = [reward_range(task) for task in self.tasks.values()]
        self.reward_range = (min(low for low, _ in ranges), max(high for _, high in ranges))

    def problem(self, split: Split, index: int, *, seed: int = 0) -> Problem:
        inner, turn = divmod(index, len(self._names))
        name = self._names[turn]
        problem = self.tasks[name].problem(split, inner, seed=seed)
        difficulty = f"{name}, {problem.difficulty}" if problem.difficulty else name
        return replace(problem, task=name, difficulty=difficulty)

    def num_problems(self, split: Split) -> int | None:
        """Count the problems of the split. For training, each finite task has then used all of its
        problems; for a held-out split, no task has repeated one."""
        all_sizes = [task.num_problems(split) for task in self.tasks.values()]
        sizes = [size for size in all_sizes if size is not None]
        if not sizes:
            return None
        return len(self.tasks) * (max(sizes) if split == "train" else min(sizes))

    def judge(self, problem: Problem, completion: str) -> Judgement:
        return self.tasks[problem.task].judge(problem, completion)

    def close(self) -> None:
        self._held.close()
