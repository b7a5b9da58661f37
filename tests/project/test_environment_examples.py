"""The adapters of `examples/environments`, with the packages that they adapt."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlad.tasks import make_task
from rlad.tasks.base import Verdict
from rlad.tasks.episodes import episode_rules
from running_servers import Client, free_port, wait_for

EXAMPLES = Path(__file__).parents[2] / "examples" / "environments"


def test_a_game_of_textarena_is_won_by_halving(monkeypatch):
    pytest.importorskip("textarena", reason="needs the package textarena")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    task = make_task(
        "environment",
        path="textarena_game:TextArenaGame",
        options={"name": "GuessTheNumber-v0"},
        timeout_seconds=60.0,
    )
    rules = episode_rules(task)
    assert rules is not None
    problem = task.problem("train", 0)
    game = rules.make()
    assert game.reset(problem, seed=0) == problem.prompt
    low, high, steps = 1, 20, []
    while not steps or not steps[-1].done:
        guess = (low + high) // 2
        steps.append(game.step(f"I guess [{guess}]"))
        low, high = (guess + 1, high) if "is higher" in steps[-1].text else (low, guess - 1)
    game.close()
    task.close()
    assert rules.judge(steps).verdict is Verdict.CORRECT and len(steps) <= 5


@pytest.fixture
def openenv_url() -> Iterator[str]:
    """A server of OpenEnv on which one counts up to a number."""
    pytest.importorskip("openenv", reason="needs the package openenv-core")
    import uvicorn
    from openenv.core.env_server import (  # pyright: ignore[reportMissingImports]
        Action,
        Environment,
        Observation,
        State,
        create_app,
    )

    class Say(Action):
        message: str

    class Heard(Observation):
        text: str = ""

    class Counting(Environment):
        SUPPORTS_CONCURRENT_SESSIONS = True

        def reset(self, seed: int | None = None, **settings: Any) -> Any:
            self.goal, self.count = (seed or 0) % 3 + 1, 0
            return Heard(text=f"Say up {self.goal} times.", done=False, reward=0.0)

        def step(self, action: Any, **settings: Any) -> Any:
            self.count += action.message == "up"
            is_there = self.count == self.goal
            return Heard(text=f"It is {self.count}.", done=is_there, reward=float(is_there))

        @property
        def state(self) -> Any:
            return State()

    app = create_app(Counting, Say, Heard, max_concurrent_envs=4)
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_for(Client(port).is_healthy, seconds=60)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(timeout=30)


def test_two_sessions_of_openenv_are_played_turn_by_turn(openenv_url, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    task = make_task(
        "environment",
        path="openenv_server:OpenEnvServer",
        options={"url": openenv_url, "action": "message", "observation": "text"},
        timeout_seconds=60.0,
    )
    rules = episode_rules(task)
    assert rules is not None
    problem = task.problem("train", 0)
    goal = problem.metadata["number"] % 2**32 % 3 + 1
    assert problem.prompt == f"Say up {goal} times.\n"
    games = [rules.make(), rules.make()]
    assert [game.reset(problem, seed=0) for game in games] == [problem.prompt] * 2
    games[1].step("down")
    steps = [games[0].step("up") for _ in range(goal)]
    for game in games:
        game.close()
    task.close()
    assert steps[-1].done and steps[-1].text == f"It is {goal}.\n"
    assert rules.judge(steps).verdict is Verdict.CORRECT
