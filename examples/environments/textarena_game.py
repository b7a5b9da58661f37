"""A single-player game of TextArena as an environment of rlad: `pip install textarena`, then

[task]
type = "environment"
path = "textarena_game:TextArenaGame"      # PYTHONPATH=examples/environments
options = { name = "GuessTheNumber-v0" }
"""

from rlad.tasks import Problem
from rlad.tasks.episodes import Environment, Step


class TextArenaGame(Environment):
    """One game; its reward is TextArena's when it is over, 0 before. Moves are written as the game
    asks, for example `[7]`."""

    def __init__(self, name: str) -> None:
        # Of the game's process alone, and of an environment with textarena.
        import textarena  # pyright: ignore[reportMissingImports]

        self._game = textarena.make(name)

    def reset(self, problem: Problem, *, seed: int) -> str:
        # The game is a part of the problem: each rollout of a group plays the same.
        self._game.reset(num_players=1, seed=problem.metadata["number"] % 2**32)
        self._read = ""
        return self._observation()

    def step(self, text: str) -> Step:
        done, _ = self._game.step(action=text)
        if not done:
            return Step(self._observation().removeprefix(f"[Player] {text}\n"))
        rewards, _ = self._game.close()
        return Step("", float(rewards[0]), done=True)

    def _observation(self) -> str:
        """Return what the game has written since the last time: it repeats all that was said."""
        _, text = self._game.get_observation()
        new = text.removeprefix(self._read)
        self._read = text
        return f"{new.strip()}\n"
