"""Sokoban: push every box onto a goal. The boards are generated, can be solved, and are shown as
text (see `rlad.tasks.games.sokoban_boards`)."""

import random
import re
from typing import Any

from rlad.config.task import SokobanConfig
from rlad.tasks.answers import final_answer
from rlad.tasks.base import Problem
from rlad.tasks.episodes import Environment, Step
from rlad.tasks.games.play import GameTask
from rlad.tasks.games.sokoban_boards import MOVES, random_layout, random_position, read_board

_MOVE = re.compile(rf"\b({'|'.join(MOVES)})\b")


class Sokoban(GameTask):
    """The task of boards with `size` x `size` cells, split by layout (walls and goals) up to
    rotation and reflection. Its settings are those of `SokobanConfig`."""

    name = "sokoban"

    def __init__(self, **settings: Any) -> None:
        self._settings = SokobanConfig(**settings)
        super().__init__(self._settings)

    def draw(self, rng: random.Random) -> Problem | None:
        settings = self._settings
        layout = random_layout(settings.size, settings.num_boxes, settings.wall_share, rng)
        found = random_position(layout, *settings.depth, rng)
        if found is None:
            return None
        position, num_moves = found
        board = layout.text(position)
        return Problem(
            prompt=self._instructions() + board + "\n",
            answer="",
            key=layout.key(),
            difficulty=f"{num_moves} moves",
            metadata={"board": board, "optimal_moves": num_moves},
        )

    def make_game(self) -> Environment:
        return SokobanGame(self._settings.moves_per_turn)

    def _instructions(self) -> str:
        if not self._settings.instructions:
            return ""
        most = self._settings.moves_per_turn
        moves = "one move" if most == 1 else f"one to {most} moves, separated by spaces"
        return (
            "Push every box onto a goal in this game of Sokoban. `@` is you, `$` a box, `.` a "
            "goal, `*` a box on a goal, `+` you on a goal, `_` free floor, `#` a wall; beyond the "
            "edge are walls too. You push a box by walking into it; you cannot pull one, nor push "
            f"two. Write {moves} in each turn: up, down, left or right, after 'Answer:', for "
            "example 'Answer: left'.\n"
        )


class SokobanGame(Environment):
    """An episode on one board. The reward is 1 when it is solved. The game ends then, or when a box
    can no longer reach a goal."""

    def __init__(self, moves_per_turn: int = 1) -> None:
        self._moves_per_turn = moves_per_turn

    def reset(self, problem: Problem, *, seed: int) -> str:
        self._layout, self._position = read_board(problem.metadata["board"])
        return problem.prompt

    def step(self, text: str) -> Step:
        moves = read_moves(text)
        notes = [] if moves else ["No move could be read."]
        if len(moves) > self._moves_per_turn:
            notes.append(f"Only the first {self._moves_per_turn} of your moves count.")
        for move in moves[: self._moves_per_turn]:
            after = self._layout.moved(self._position, move)
            if after is None:
                notes.append(f"You cannot move {move}.")
                continue
            self._position = after
            if self._layout.is_solved(after):
                break
        is_solved = self._layout.is_solved(self._position)
        is_lost = not self._position.boxes <= self._layout.live_cells
        if is_lost:
            notes.append("A box can no longer reach a goal.")
        board = self._layout.text(self._position)
        return Step(
            "\n".join([*notes, board, ""]),
            reward=float(is_solved),
            done=is_solved or is_lost,
            info={"success": is_solved, "feedback": " ".join(notes)},
        )


def read_moves(text: str) -> list[str]:
    """Read the moves in the final answer of a text."""
    return _MOVE.findall(final_answer(text).lower())
