"""A user's environments in a separate process with limits of time and memory. An environment that
hangs, raises, dies or uses too much memory costs one rollout instead of the run.

Many episodes share the process. If one of them ends it, the states of the others are lost, and are
rebuilt from their turns. This works if an environment is deterministic.
"""

import contextlib
import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from rlad.tasks.base import MAX_FEEDBACK_CHARACTERS, Problem
from rlad.tasks.episodes import Environment, EpisodeFailed, Step, checked_step, checked_text
from rlad.tasks.worker import CallFailed, Worker

_GONE = "gone"


class IsolatedEnvironments:
    """A maker of environments that run in one process, which starts with the first call.

    `make` must be picklable; the process calls it once for each episode. `load` is called when the
    process starts, without the time limit.
    """

    def __init__(
        self,
        make: Callable[[], Any],
        *,
        timeout_seconds: float,
        max_memory_gib: float,
        load: Callable[[], object],
    ) -> None:
        self._begin = partial(_begin, make)
        self._numbers = itertools.count()
        self._worker = Worker(
            _call,
            timeout_seconds=timeout_seconds,
            max_memory_gib=max_memory_gib,
            initializer=load,
        )

    def make(self) -> Environment:
        return _Isolated(self._ask, self._begin, next(self._numbers))

    def _ask(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            value, failure = self._worker.call(function, arguments)
        except CallFailed as error:
            raise EpisodeFailed(str(error)) from None
        if failure:
            raise EpisodeFailed(failure)
        return value

    def close(self) -> None:
        self._worker.close()


class _Isolated(Environment):
    """One episode, with the number `number` in the process."""

    def __init__(
        self, ask: Callable[..., Any], begin: Callable[[int, Problem, int], str], number: int
    ) -> None:
        self._ask = ask
        self._begin = begin
        self._number = number
        self._turns: list[tuple[str, str]] = []
        """texts of the model, each with the environment's reply"""
        self._is_held = False

    def reset(self, problem: Problem, *, seed: int) -> str:
        self._start = problem, seed
        self._turns = []
        text = self._ask(self._begin, self._number, problem, seed)
        self._is_held = True
        self._first_text = text
        return text

    def step(self, text: str) -> Step:
        step = self._ask(_step, self._number, text)
        if step == _GONE:
            self._repeat()
            step = self._ask(_step, self._number, text)
        if step == _GONE:
            raise EpisodeFailed("the process ended twice in one turn")
        self._turns.append((text, step.text))
        return step

    def _repeat(self) -> None:
        """Rebuild, in a new process, the state that the environment had when the old one ended."""
        texts = [self._ask(self._begin, self._number, *self._start)]
        for written, _ in self._turns:
            step = self._ask(_step, self._number, written)
            texts.append(step if step == _GONE else step.text)
        if texts != [self._first_text, *(reply for _, reply in self._turns)]:
            raise EpisodeFailed(
                "another episode ended the process, and this one does not repeat what it did"
            )

    def close(self) -> None:
        if self._is_held:
            self._is_held = False
            with contextlib.suppress(EpisodeFailed):  # its rollout is complete
                self._ask(_end, self._number)


# --- in the process -------------------------------------------------------------------------------

_environments: dict[int, Any] = {}


def _call(function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Any, str]:
    """Return a function's result and, if it failed, the reason."""
    try:
        return function(*arguments), ""
    except EpisodeFailed as failure:
        return None, str(failure)


def _begin(make: Callable[[], Any], number: int, problem: Problem, seed: int) -> str:
    environment = make()
    text = checked_text(environment.reset(problem, seed=seed))
    _environments[number] = environment
    return text


def _step(number: int, text: str) -> Step | str:
    environment = _environments.get(number)
    if environment is None:
        return _GONE
    step = checked_step(environment.step(text))
    # Only the entries that are read leave the process. Others may be anything.
    info = {}
    if "success" in step.info:
        info["success"] = bool(step.info["success"])
    if "feedback" in step.info:
        info["feedback"] = str(step.info["feedback"])[:MAX_FEEDBACK_CHARACTERS]
    return replace(step, info=info)


def _end(number: int) -> None:
    environment = _environments.pop(number, None)
    if hasattr(environment, "close"):
        environment.close()  # pyright: ignore[reportOptionalMemberAccess]
