"""Boards of Sokoban: their text, their moves, and their distance from a solution.

A position is (player, boxes) on a layout of walls and goals; beyond its edge there are walls.
A search backwards from all solved positions finds the positions that can be solved, and the least
number of moves for each.

    #  wall      _  floor      .  goal
    @  player    $  box        *  box on a goal      +  player on a goal
"""

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

Cell: TypeAlias = tuple[int, int]
"""(row, column)"""

MOVES: dict[str, Cell] = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}

_FLOOR = {"@": "_", "$": "_", "*": ".", "+": "."}
"""cell under the player or a box, by symbol"""


@dataclass(frozen=True, slots=True)
class Position:
    """The cells of the player and the boxes."""

    player: Cell
    boxes: frozenset[Cell]


@dataclass(frozen=True)
class Layout:
    """The walls and goals of a board, as rows of `#`, `_` and `.`."""

    rows: tuple[str, ...]

    @cached_property
    def floor(self) -> frozenset[Cell]:
        """The cells without a wall."""
        return frozenset(cell for cell, symbol in self._cells() if symbol != "#")

    @cached_property
    def goals(self) -> frozenset[Cell]:
        return frozenset(cell for cell, symbol in self._cells() if symbol == ".")

    def _cells(self) -> Iterator[tuple[Cell, str]]:
        for row, symbols in enumerate(self.rows):
            for column, symbol in enumerate(symbols):
                yield (row, column), symbol

    def is_solved(self, position: Position) -> bool:
        return position.boxes == self.goals

    def moved(self, position: Position, move: str) -> Position | None:
        """Return the position after a move; None if a wall or a box is in the way."""
        ahead = _next(position.player, MOVES[move])
        if ahead not in self.floor:
            return None
        if ahead not in position.boxes:
            return Position(ahead, position.boxes)
        beyond = _next(ahead, MOVES[move])
        if beyond not in self.floor or beyond in position.boxes:
            return None
        return Position(ahead, position.boxes - {ahead} | {beyond})

    @cached_property
    def live_cells(self) -> frozenset[Cell]:
        """The cells from which a single box can be pushed to a goal. A box on any other cell is
        lost."""
        live = set(self.goals)
        waiting = list(self.goals)
        while waiting:
            cell = waiting.pop()
            for step in MOVES.values():
                # A push into `cell` came from `before`, with the player one further.
                before = _next(cell, step)
                if before in live or before not in self.floor:
                    continue
                if _next(before, step) in self.floor:
                    live.add(before)
                    waiting.append(before)
        return frozenset(live)

    def distances(self, max_moves: int) -> dict[Position, int]:
        """Compute the least number of moves to a solution, for every position that at most
        `max_moves` moves solve."""
        # This is a backward breadth-first search from all solved positions.
        sources = [Position(player, self.goals) for player in sorted(self.floor - self.goals)]
        distance = dict.fromkeys(sources, 0)
        frontier = sources
        for moves in range(1, max_moves + 1):
            reached = []
            for position in frontier:
                for earlier in self._earlier(position):
                    if earlier not in distance:
                        distance[earlier] = moves
                        reached.append(earlier)
            frontier = reached
        return distance

    def _earlier(self, position: Position) -> Iterator[Position]:
        """Yield every position from which one move leads to this one."""
        for step in MOVES.values():
            player = _next(position.player, (-step[0], -step[1]))
            if player not in self.floor or player in position.boxes:
                continue
            yield Position(player, position.boxes)
            ahead = _next(position.player, step)
            if ahead in position.boxes:
                yield Position(player, position.boxes - {ahead} | {position.player})

    def best_moves(self, position: Position, distance: dict[Position, int]) -> list[str]:
        """List the moves on a shortest solution of a position in `distance`."""
        after = {move: self.moved(position, move) for move in MOVES}
        return [m for m, p in after.items() if p and distance.get(p) == distance[position] - 1]

    def text(self, position: Position) -> str:
        """Draw the board, one line a row."""
        rows = [list(row) for row in self.rows]
        for row, column in position.boxes:
            rows[row][column] = "*" if rows[row][column] == "." else "$"
        row, column = position.player
        rows[row][column] = "+" if rows[row][column] == "." else "@"
        return "\n".join("".join(row) for row in rows)

    def key(self) -> str:
        """Hash the layout. Rotated and reflected layouts have the same hash."""
        first = min("\n".join(rows) for rows in symmetries(self.rows))
        return hashlib.sha256(first.encode()).hexdigest()[:16]


def _next(cell: Cell, step: Cell) -> Cell:
    return cell[0] + step[0], cell[1] + step[1]


def symmetries(rows: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Return the rows rotated and reflected in all eight ways."""
    turned = [rows]
    for _ in range(3):
        turned.append(tuple("".join(column) for column in zip(*turned[-1][::-1], strict=True)))
    return turned + [one[::-1] for one in turned]


def read_board(text: str) -> tuple[Layout, Position]:
    """Read a board that `Layout.text` drew."""
    rows = text.splitlines()
    layout = Layout(tuple("".join(_FLOOR.get(symbol, symbol) for symbol in row) for row in rows))
    cells = [((r, c), symbol) for r, row in enumerate(rows) for c, symbol in enumerate(row)]
    (player,) = [cell for cell, symbol in cells if symbol in "@+"]
    return layout, Position(player, frozenset(cell for cell, symbol in cells if symbol in "$*"))


def random_layout(size: int, num_boxes: int, wall_share: float, rng: random.Random) -> Layout:
    """Draw a random square layout with a share of walls and one connected floor. Beyond the edge of
    the board there are walls."""
    cells = [(row, column) for row in range(size) for column in range(size)]
    while True:  # ends: without walls there is room
        floor = {cell for cell in cells if rng.random() >= wall_share}
        floor = max(_parts(floor), key=lambda part: (len(part), sorted(part)), default=set())
        if len(floor) > 2 * num_boxes:
            break
    goals = set(rng.sample(sorted(floor), num_boxes))
    rows = [["#"] * size for _ in range(size)]
    for row, column in floor:
        rows[row][column] = "." if (row, column) in goals else "_"
    return Layout(tuple("".join(row) for row in rows))


def _parts(floor: set[Cell]) -> list[set[Cell]]:
    """Divide cells into connected parts."""
    left = set(floor)
    parts = []
    while left:
        part = {left.pop()}
        waiting = list(part)
        while waiting:
            cell = waiting.pop()
            near = {_next(cell, step) for step in MOVES.values()} & left
            left -= near
            part |= near
            waiting += near
        parts.append(part)
    return parts


def random_position(
    layout: Layout, least_moves: int, most_moves: int, rng: random.Random
) -> tuple[Position, int] | None:
    """Draw a position that needs `least_moves` to `most_moves` moves, and return it with that
    number; None if the layout has none. All numbers of moves that occur are equally likely."""
    by_moves: dict[int, list[Position]] = {}
    for position, moves in layout.distances(most_moves).items():
        # No box starts on a goal, so every box must be moved.
        if moves >= least_moves and not position.boxes & layout.goals:
            by_moves.setdefault(moves, []).append(position)
    if not by_moves:
        return None
    moves = rng.choice(sorted(by_moves))
    positions = sorted(by_moves[moves], key=lambda one: (one.player, sorted(one.boxes)))
    return rng.choice(positions), moves
