import itertools
import json
import random
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlad.errors import UserError
from rlad.tasks import SPLITS, make_task, split_of
from rlad.tasks.base import Verdict
from rlad.tasks.episodes import episode_rules
from rlad.tasks.games.island_questions import can_be_settled
from rlad.tasks.games.sokoban import SokobanGame, read_moves
from rlad.tasks.games.sokoban_boards import (
    MOVES,
    Layout,
    random_layout,
    random_position,
    read_board,
    symmetries,
)

SOKOBAN = [
    {"size": 4, "depth": (2, 8)},
    {"size": 5, "num_boxes": 2, "wall_share": 0.2, "depth": (3, 14)},
    {"size": 6, "num_boxes": 1, "wall_share": 0.05},
]


def slow_solution(board: str) -> list[str] | None:
    """Search forward, on a dictionary of symbols alone: the first of the shortest solutions."""
    cells = {
        (r, c): symbol
        for r, line in enumerate(board.splitlines())
        for c, symbol in enumerate(line)
        if symbol != "#"
    }
    goals = {cell for cell, symbol in cells.items() if symbol in ".*+"}
    boxes = frozenset(cell for cell, symbol in cells.items() if symbol in "$*")
    (player,) = (cell for cell, symbol in cells.items() if symbol in "@+")
    seen = {(player, boxes)}
    queue = deque([(player, boxes, [])])
    while queue:
        player, boxes, moves = queue.popleft()
        if boxes <= goals:
            return moves
        for name, (down, right) in MOVES.items():
            to = player[0] + down, player[1] + right
            after = boxes
            if to in boxes:
                beyond = to[0] + down, to[1] + right
                if beyond not in cells or beyond in boxes:
                    continue
                after = boxes - {to} | {beyond}
            if to in cells and (to, after) not in seen:
                seen.add((to, after))
                queue.append((to, after, [*moves, name]))
    return None


@pytest.mark.parametrize("options", SOKOBAN)
def test_every_board_is_solved_by_as_many_moves_as_it_says_and_by_no_fewer(options):
    task = make_task("sokoban", **options)
    rules = episode_rules(task)
    assert rules is not None
    for split, index in itertools.product(SPLITS, range(8)):
        problem = task.problem(split, index)
        moves = slow_solution(problem.metadata["board"])
        assert moves is not None
        least, most = options.get("depth", (2, 10))
        assert len(moves) == problem.metadata["optimal_moves"]
        assert least <= len(moves) <= most and problem.difficulty == f"{len(moves)} moves"
        game = rules.make()
        assert game.reset(problem, seed=0) == problem.prompt
        steps = [game.step(f"So: Answer: {move}.") for move in moves]
        assert [step.done for step in steps] == [False] * (len(moves) - 1) + [True]
        assert rules.judge(steps).reward == 1 and rules.judge(steps).verdict is Verdict.CORRECT
        assert rules.judge(steps[:-1]).verdict is not Verdict.CORRECT


def test_distances_are_those_of_a_search_from_each_position():
    layout = Layout(("__#_", "____", "_#._", "____"))
    distance = layout.distances(40)
    cells = sorted(layout.floor)
    for player, box in itertools.permutations(cells, 2):
        position = next((p for p in distance if (p.player, *p.boxes) == (player, box)), None)
        text = read_board(layout.text(next(iter(distance))))[0].rows
        rows = [list(row) for row in text]
        rows[box[0]][box[1]] = "*" if box in layout.goals else "$"
        rows[player[0]][player[1]] = "+" if player in layout.goals else "@"
        moves = slow_solution("\n".join("".join(row) for row in rows))
        assert (None if moves is None else len(moves)) == (
            None if position is None else distance[position]
        )
        if position is not None and moves:
            assert moves[0] in layout.best_moves(position, distance)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**9), st.sampled_from([4, 5, 6]), st.sampled_from([1, 2, 3]))
def test_a_layout_has_one_key_in_all_eight_views(seed, size, num_boxes):
    layout = random_layout(size, num_boxes, 0.2, random.Random(seed))
    views = symmetries(layout.rows)
    assert len(views) == 8 and {Layout(view).key() for view in views} == {layout.key()}
    turned = tuple(zip(*layout.rows[::-1], strict=True))
    assert "".join(map("".join, turned)) == "".join(views[1])
    found = random_position(layout, 1, 6, random.Random(seed))
    if found is not None:
        assert read_board(layout.text(found[0])) == (layout, found[0])


def test_no_board_of_a_split_is_a_view_of_one_in_another():
    task = make_task("sokoban", size=4, wall_share=0.05, depth=(2, 8))
    seen: dict[tuple[str, ...], str] = {}
    for split, index in itertools.product(SPLITS, range(60)):
        problem = task.problem(split, index, seed=7)
        assert problem == task.problem(split, index, seed=7)
        assert split_of(problem.key) == split and json.dumps(problem.metadata)
        for view in symmetries(read_board(problem.metadata["board"])[0].rows):
            assert seen.setdefault(view, split) == split
    assert task.problem("train", 0, seed=7) != task.problem("train", 0, seed=8)


def play(board: str, *turns: str, moves_per_turn: int = 1):
    task = make_task("sokoban")
    game = SokobanGame(moves_per_turn)
    metadata = {"board": board}
    problem = task.problem("train", 0)
    game.reset(type(problem)(board, "", "", metadata=metadata), seed=0)
    return [game.step(turn) for turn in turns]


def test_a_game_worked_by_hand():
    # The player walks round the box and pushes it right, onto the goal.
    first, second, blocked, third = play("____\n@$_.\n____", "left", "right", "up?", "right")
    assert first.text == "You cannot move left.\n____\n@$_.\n____\n" and not first.done
    assert second.text == "____\n_@$.\n____\n"
    assert blocked.text == "_@__\n__$.\n____\n"
    assert third.text == "__@_\n__$.\n____\n"
    solved, *_ = play("_@$.", "right")
    assert solved.text == "__@*\n" and (solved.reward, solved.done) == (1, True)
    # Two boxes in a row do not move, nor does one before a wall.
    assert play("@$$_..", "right")[0].text.startswith("You cannot move right.")
    assert play("@$#_..", "right")[0].text.startswith("You cannot move right.")


def test_a_box_that_cannot_reach_a_goal_ends_the_game():
    (lost,) = play("____\n_$__\n_@._\n____", "up")
    assert lost.done and not lost.info["success"] and "no longer" in lost.text
    # Along this edge there is a goal: it goes on.
    (held,) = play("___.\n_$__\n_@__\n____", "up")
    assert not held.done


def test_moves_are_read_in_the_final_answer_and_so_many_count():
    assert read_moves("up is bad.\nAnswer: Right, right; DOWN") == ["right", "right", "down"]
    assert read_moves("upper") == read_moves("") == []
    assert play("@$_.", "no")[0].text == "No move could be read.\n@$_.\n"
    one, two = (play("@$_.", "right right", moves_per_turn=n)[0] for n in (1, 2))
    assert one.text == "Only the first 1 of your moves count.\n_@$.\n" and two.reward == 1


def test_settings_that_no_board_meets_are_one_sentence():
    with pytest.raises(UserError, match="put the smaller number first"):
        make_task("sokoban", depth=(5, 4))
    with pytest.raises(UserError, match="found no train problem in 2000 draws"):
        make_task("sokoban", size=4, depth=(60, 70)).problem("train", 0)


# --- questions on the island ----------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"num_people": 4, "num_questions": 3, "vary_names": True}])
def test_somebody_who_asks_and_thinks_always_finds_the_roles(options):
    task = make_task("island_questions", **options)
    rules = episode_rules(task)
    assert rules is not None
    for split, index in itertools.product(SPLITS, range(5)):
        problem = task.problem(split, index)
        assert problem == task.problem(split, index) and split_of(problem.key) == split
        names = problem.metadata["names"]
        roles = dict(zip(names, problem.metadata["world"], strict=True))
        game = rules.make()
        assert game.reset(problem, seed=0) == problem.prompt
        for asked, about in itertools.islice(itertools.pairwise(names), 2):
            step = game.step(f"Ask {asked}: is {about} a knight?")
            assert step.text == f"{asked} says {'yes' if roles[asked] == roles[about] else 'no'}.\n"
        assert rules.judge([game.step(f"Answer: {problem.answer}.")]).reward == 1


def test_a_question_about_snow_shows_a_knave_and_others_cost_a_turn():
    task = make_task("island_questions", num_questions=2)
    problem = task.problem("train", 1)
    game = task.episode_rules.make()  # pyright: ignore[reportAttributeAccessIssue]
    game.reset(problem, seed=0)
    is_knight = problem.metadata["world"][0]
    assert (
        game.step("ask ada: is snow white?").text == f"Ada says {'yes' if is_knight else 'no'}.\n"
    )
    assert game.step("Ask Zoe: is Ada a knight?").text == "Nobody knows that name.\n"
    last = game.step("Ask Ada: is snow white?")
    assert last.done and last.reward == 0 and not last.info["success"]
    assert task.judge(problem, "Answer: Ada is a knight.").verdict is Verdict.WRONG


def test_what_questions_settle_by_hand():
    both = [(True, True), (False, False)]
    assert can_be_settled(both, 1) and not can_be_settled(both, 0)
    every = list(itertools.product((True, False), repeat=2))
    assert can_be_settled(every, 2) and not can_be_settled(every, 1)
    assert can_be_settled(every[:1], 0)
