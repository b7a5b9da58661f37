import itertools
import random
import sys
from pathlib import Path

import pytest

from loaded_scripts import load_script
from rlad.models.loading import load_language_model
from rlad.tasks import split_of
from rlad.tasks.games.sokoban_boards import Layout, read_board

SCRIPT = Path(__file__).parents[2] / "recipes" / "sokoban-tiny" / "make.py"


@pytest.fixture(scope="module")
def make():
    return load_script(SCRIPT)


def board_of(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if " " not in line)


def test_the_solvers_moves_are_learned_on_training_boards_alone(make):
    tokenizer = make.make_tokenizer()
    for turns in itertools.islice(make.games(make.TEACHER), 20):
        layouts = {read_board(board_of(turn.text))[0] for turn in turns}
        (layout,) = layouts
        assert split_of(layout.key()) == "train"
        distance = layout.distances(make.MAX_DISTANCE)
        for turn in turns:
            position = read_board(board_of(turn.text))[1]
            assert turn.learned in layout.best_moves(position, distance)
        ids, labels = make.encode(turns, tokenizer)
        text = "".join(turn.text + turn.move + make.END for turn in turns)
        assert tokenizer.decode(ids) == text
        learned = [label for label in labels if label != make.IGNORED]
        assert tokenizer.decode(learned) == "".join(turn.learned + make.END for turn in turns)
        assert len(learned) == 2 * len(turns)


def test_a_game_that_slips_shows_the_move_that_was_made(make):
    layout = Layout(("____", "____", "_.__", "____"))
    position = next(p for p, moves in layout.distances(9).items() if moves == 6)
    turns = [
        turn
        for seed in range(30)
        for turn in make.play(layout, position, 0.0, random.Random(seed))
        if turn.move != turn.learned
    ]
    assert turns and {turn.move for turn in turns} == {"up", "down", "left", "right"}


def test_a_player_in_a_hurry_walks_to_the_box_and_pushes_it(make):
    layout, position = read_board("____\n_@$_\n__._\n____")
    assert make.hasty_moves(layout, position) == ["right"]  # away from the goal
    layout, position = read_board("@___\n____\n__$_\n___.")
    assert make.hasty_moves(layout, position) == ["down", "right"]
    learned = [
        turn.learned
        for seed in range(60)
        for turn in make.play(layout, position, 0.8, random.Random(seed))[:1]
    ]
    assert set(learned) == {"down", "right"}


def test_one_command_makes_two_small_models_that_rlad_loads(make, tmp_path, monkeypatch):
    short = make.Training(2, seed=1, batch_size=4)
    for name in ("TEACHER", "STUDENT"):
        monkeypatch.setattr(make, name, short)
    monkeypatch.setattr(make, "WEAKER_TEACHERS", {"weaker": short})
    monkeypatch.setattr(sys, "argv", ["make.py", "--out", str(tmp_path), "--weaker-teachers"])
    make.main()
    for name in ("student", "teacher", "weaker"):
        size = sum(file.stat().st_size for file in (tmp_path / name).iterdir())
        assert size < 2**20
        loaded = load_language_model(str(tmp_path / name))
        config = loaded.model.config
        assert config.hidden_size // config.num_attention_heads == 32
        (token,) = loaded.tokenizer("right")["input_ids"]
        assert loaded.tokenizer.decode([token]) == "right"
        assert loaded.eos_token_ids == (loaded.tokenizer.eos_token_id,)
