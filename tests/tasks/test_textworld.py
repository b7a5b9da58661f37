"""A real TextWorld game in the process of the task `environment`."""

import pytest

from rlad.tasks import make_task
from rlad.tasks.base import Verdict
from rlad.tasks.episodes import episode_rules

pytest.importorskip("textworld", reason="needs the optional package textworld")
pytestmark = pytest.mark.textworld


def test_a_game_is_won_by_its_own_quest_and_by_nothing_else():
    task = make_task(
        "environment",
        path="rlad.tasks.games.text_world:TextWorld",
        options={"num_rooms": 2, "num_objects": 4, "quest_length": 2},
        timeout_seconds=120.0,
    )
    try:
        problem = task.problem("train", 0)
        assert problem == task.problem("train", 0)
        assert len(problem.prompt) > 200 and problem.prompt.endswith("\n")
        rules = episode_rules(task)
        assert rules is not None
        for commands, verdict in ((quest(problem.metadata["number"]), "correct"), (["look"], "")):
            game = rules.make()
            assert game.reset(problem, seed=0) == problem.prompt
            steps = [game.step(f"Answer: {command}") for command in commands]
            game.close()
            assert steps[-1].done == bool(verdict)
            assert rules.judge(steps).verdict == (verdict or Verdict.WRONG)
    finally:
        task.close()


def quest(number: int) -> list[str]:
    """The commands that TextWorld itself says win the game."""
    import textworld  # pyright: ignore[reportMissingImports]

    from rlad.tasks.games.text_world import make_game

    wanted = textworld.EnvInfos(policy_commands=True)
    game = textworld.start(make_game(number, 2, 4, 2), wanted)
    return list(game.reset()["policy_commands"])
