"""An environment on an OpenEnv server as one of rlad: `pip install openenv-core`, start the server,
then

[task]
type = "environment"
path = "openenv_server:OpenEnvServer"      # PYTHONPATH=examples/environments
options = { url = "http://127.0.0.1:8000", action = "message", observation = "echoed_message" }
"""

from typing import Any

from rlad.tasks import Problem
from rlad.tasks.episodes import Environment, Step


class OpenEnvServer(Environment):
    """One session on the server. What the model writes is the field `action` of OpenEnv's action,
    and it reads the field `observation` of what comes back."""

    def __init__(self, url: str, action: str, observation: str) -> None:
        # Of the session's process alone, and of an environment with openenv.
        from openenv.core import GenericEnvClient  # pyright: ignore[reportMissingImports]

        self._session = GenericEnvClient(base_url=url).sync()
        self._session.connect()
        self._action = action
        self._observation = observation

    def reset(self, problem: Problem, *, seed: int) -> str:
        # The state is a part of the problem: each rollout of a group begins alike.
        result = self._session.reset(seed=problem.metadata["number"] % 2**32)
        return self._text(result)

    def step(self, text: str) -> Step:
        result = self._session.step({self._action: text})
        return Step(self._text(result), float(result.reward or 0.0), bool(result.done))

    def close(self) -> None:
        self._session.close()

    def _text(self, result: Any) -> str:
        return f"{result.observation[self._observation]}\n"
