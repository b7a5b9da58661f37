"""The adapters of `examples/environments`, with the packages that they adapt."""

from pathlib import Path

import pytest

from rlad.tasks import make_task
from rlad.tasks.base import Verdict
from rlad.tasks.episodes import episode_rules

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
