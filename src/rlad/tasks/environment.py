"""The task `environment`: a user's class in which the model acts over several turns."""

import importlib
import inspect
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

from rlad.errors import UserError
from rlad.seeds import stream_seed
from rlad.tasks.base import Judgement, Problem, Split, cannot_judge, split_of
from rlad.tasks.episodes import EpisodeFailed, EpisodeRules, RewardRule
from rlad.tasks.isolated import IsolatedEnvironments
from rlad.tasks.tools import ToolEnvironment, describe_tools, has_tools
from rlad.tasks.worker import MAX_MEMORY_GIB

_NUM_REMEMBERED_PROMPTS = 4096
_MAX_ATTEMPTS = 1_000


class EnvironmentTask:
    """A task whose problems are the initial states of an environment's episodes.

    `path` names a class as `package.module:Class`, with `reset(problem, seed)` and `step(text)`. It
    may have a static method `problem(number) -> Problem` for any number from 0 to 2^63; without
    this, a problem has its number in `metadata["number"]`. An empty prompt is replaced by the text
    that `reset` returns. The key decides the split.

    Alternatively the class has TRL's interface (see `rlad.tasks.tools`): `reset(number=...)` is
    called, the system message describes its tools, and the reward is the last value of
    `get_reward`.
    """

    def __init__(
        self,
        path: str,
        options: dict[str, Any] | None = None,
        max_turns: int = 10,
        max_turn_tokens: int | None = None,
        reward: RewardRule = "sum",
        success_reward: float = 1.0,
        timeout_seconds: float = 10.0,
        max_memory_gib: float = MAX_MEMORY_GIB,
    ) -> None:
        self.name = path.rpartition(":")[2]
        self.reward_range = (float("-inf"), float("inf"))
        self._class = import_class(path)
        self._tools = describe_tools(self._class) if has_tools(self._class) else ""
        self._environments = IsolatedEnvironments(
            partial(_make, path, options or {}),
            timeout_seconds=timeout_seconds,
            max_memory_gib=max_memory_gib,
            load=partial(import_class, path),
        )
        self.episode_rules = EpisodeRules(
            self._environments.make,
            max_turns,
            max_turn_tokens,
            "last" if self._tools else reward,
            success_reward,
        )
        self._prompt_of = lru_cache(_NUM_REMEMBERED_PROMPTS)(self._first_text)

    def problem(self, split: Split, index: int, *, seed: int = 0) -> Problem:
        for attempt in range(_MAX_ATTEMPTS):
            number = stream_seed(seed, "environment", split, index, attempt)
            problem = self._numbered(number)
            if split_of(problem.key) == split:
                prompt = problem.prompt or self._prompt_of(number)
                messages = problem.messages
                if self._tools:
                    messages = (("system", self._tools), ("user", prompt))
                return replace(problem, prompt=prompt, messages=messages)
        raise UserError(
            f"the environment {self.name} has no {split} problem among {_MAX_ATTEMPTS} numbers: "
            "the keys of problems decide their split, so give different problems different keys."
        )

    def num_problems(self, split: Split) -> int | None:
        return None

    def judge(self, problem: Problem, completion: str) -> Judgement:
        """Grade a completion as the only turn of an episode."""
        environment = self._environments.make()
        try:
            environment.reset(problem, seed=0)
            return self.episode_rules.judge([environment.step(completion)])
        except EpisodeFailed as failure:
            return cannot_judge(str(failure))
        finally:
            environment.close()

    def close(self) -> None:
        self._environments.close()

    def _numbered(self, number: int) -> Problem:
        make = getattr(self._class, "problem", None)
        if make is not None and not self._tools:
            return make(number)
        return Problem("", "", str(number), metadata={"number": number})

    def _first_text(self, number: int) -> str:
        environment = self._environments.make()
        try:
            return environment.reset(self._numbered(number), seed=0)
        except EpisodeFailed as failure:
            raise UserError(
                f"the environment {self.name} cannot be reset for problem {number} ({failure}); "
                "fix its `reset`."
            ) from None
        finally:
            environment.close()


def _make(path: str, options: dict[str, Any]) -> Any:
    made = import_class(path)(**options)
    return ToolEnvironment(made) if has_tools(type(made)) else made


def import_class(path: str) -> type:
    """Import the class that `package.module:Class` names. Raises `UserError` if it does not exist,
    or has no `reset` with `step` or `get_reward`."""
    module, _, name = path.partition(":")
    try:
        with redirect_stdout(sys.stderr):  # what a module prints is not the command's output
            found = getattr(importlib.import_module(module), name)
    except Exception as error:  # the user's module may raise anything
        raise UserError(
            f"environment {path!r} cannot be used ({type(error).__name__}: {error}); write it as "
            "'package.module:Class', with the folder of the package on PYTHONPATH."
        ) from error
    methods = {name for name in ("reset", "step", "get_reward") if hasattr(found, name)}
    if not inspect.isclass(found) or "reset" not in methods or len(methods) < 2:
        raise UserError(
            f"environment {path!r} is not a class with the methods reset(problem, seed) and "
            "step(text), or reset and get_reward; name a class that has them."
        )
    return found
