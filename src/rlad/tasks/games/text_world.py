"""An environment of TextWorld's generated text adventures (arXiv 1806.11532):

    [task]
    type = "environment"
    path = "rlad.tasks.games.text_world:TextWorld"
    options = { num_rooms = 2, num_objects = 4, quest_length = 3 }
    timeout_seconds = 60.0      # making a game takes some seconds

Needs the package textworld (`pip install rlad[textworld]`).
"""

import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

from rlad.errors import UserError
from rlad.tasks.answers import final_answer
from rlad.tasks.base import Problem
from rlad.tasks.episodes import Environment, Step

_folder = lru_cache(1)(tempfile.TemporaryDirectory)
"""makes the folder of this process's games, which is deleted with the process"""


class TextWorld(Environment):
    """An episode of a quest of `quest_length` commands. The reward is 1 when it is done."""

    def __init__(self, num_rooms: int = 2, num_objects: int = 4, quest_length: int = 3) -> None:
        self._size = num_rooms, num_objects, quest_length

    def reset(self, problem: Problem, *, seed: int) -> str:
        textworld = _textworld()
        wanted = textworld.EnvInfos(won=True, lost=True)
        self._game = textworld.start(make_game(problem.metadata["number"], *self._size), wanted)
        return _text(self._game.reset().feedback)

    def step(self, text: str) -> Step:
        state, _, _ = self._game.step(final_answer(text))
        won = bool(state.won)
        return Step(_text(state.feedback), float(won), won or bool(state.lost), {"success": won})

    def close(self) -> None:
        self._game.close()


@lru_cache(256)
def make_game(number: int, num_rooms: int, num_objects: int, quest_length: int) -> str:
    """Make the game with this number, and return its file."""
    options = _textworld().GameOptions()
    options.seeds = number % 2**32
    options.nb_rooms = num_rooms
    options.nb_objects = num_objects
    options.quest_length = quest_length
    options.path = str(Path(_folder().name) / f"{number}.z8")
    path, _ = _textworld().make(options)
    return path


def _textworld() -> Any:
    try:
        import textworld  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            "TextWorld needs the package textworld, which is not installed; install it with pip "
            'install "rlad[textworld]".'
        ) from error
    return textworld


def _text(feedback: str) -> str:
    """Remove empty lines at the start and end of the game's text."""
    return feedback.strip() + "\n"
