from typing import Any

import pytest

from rlad.checks.episodes import check_episodes, play
from rlad.tasks import make_task
from rlad.tasks.episodes import episode_rules

NUM_MADE = [0]


class Drifting:
    """Has another first text, or other replies, each time, as its option says."""

    def __init__(self, where: str) -> None:
        self.where = where

    def reset(self, problem: Any, *, seed: int) -> str:
        NUM_MADE[0] += 1
        return f"Go {NUM_MADE[0] if self.where == 'first' else ''}"

    def step(self, text: str) -> Any:
        if self.where == "fails":
            raise RuntimeError("no door")
        return str(NUM_MADE[0]), 0.5, True, {}


@pytest.mark.parametrize(
    ("where", "level", "sentence"),
    [
        ("first", "error", "begins training problem 0 differently each time"),
        ("later", "warning", "not the same twice with one seed"),
        ("fails", "error", "fails in turn 1 of training problem 0: RuntimeError: no door"),
    ],
)
def test_what_an_environment_may_not_do_is_a_finding(where, level, sentence):
    path = "test_check_episodes:Drifting"
    task = make_task("environment", path=path, options={"where": where})
    (finding,) = check_episodes(task, task.episode_rules, seed=0)  # type: ignore[attr-defined]
    task.close()
    assert (finding.level, finding.subject) == (level, "environment")
    assert sentence in finding.message


@pytest.mark.parametrize("name", ["sokoban", "island_questions"])
def test_a_game_is_played_with_its_own_words(name):
    task = make_task(name)
    rules = episode_rules(task)
    assert rules is not None
    (finding,) = check_episodes(task, rules, seed=3)
    assert finding.level == "ok" and "the same twice with one seed" in finding.message
    problem = task.problem("train", 0)
    assert play(rules, problem, seed=1).outcome == play(rules, problem, seed=1).outcome
