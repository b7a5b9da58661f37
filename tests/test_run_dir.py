"""The run directory: rows that survive a half-written line, checkpoints that are complete or absent, which one is best."""

import json
import math
from pathlib import Path

import pytest

from rlad.run_dir import EVAL, METRICS, SAMPLES, CannotWriteError, RunDirectory


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    directory = RunDirectory(tmp_path / "run")
    directory.create()
    directory.write("run.json", "{}")
    directory.write("config.toml", "seed = 0\n")
    return directory


def write_checkpoint(run: RunDirectory, *steps: int) -> None:
    for step in steps:
        run.write_checkpoint(step, lambda folder: (folder / "weights").write_text("w") and None)


def validated(run: RunDirectory, scores: dict[int, float]) -> None:
    for step, score in scores.items():
        run.append(EVAL, {"step": step, "split": "test", "pass@1": {"mean": 1.0}})
        run.append(EVAL, {"step": step, "split": "validation", "pass@1": {"mean": score}})


def test_rows_read_back(run):
    rows = [{"step": 1, "x": 0.1 + 0.2}, {"step": 2, "text": "a\nb\u2028 ü \x00"}]
    for row in rows:
        run.append(METRICS, row)
    assert list(run.read(METRICS)) == rows
    assert list(run.read(SAMPLES)) == []


def test_nan_reads_back(run):
    run.append(METRICS, {"step": 1, "reward": math.nan})
    (row,) = run.read(METRICS)
    assert math.isnan(row["reward"])


def test_a_half_written_last_line_is_passed_over(run):
    run.append(METRICS, {"step": 1})
    (run.path / METRICS).open("a").write('{"step": 2')
    assert [row["step"] for row in run.read(METRICS)] == [1]


@pytest.mark.parametrize(("step", "kept"), [(-1, []), (0, [0]), (2, [0, 1, 2, 2]), (9, [0, 1, 2, 2, 3])])
def test_forget_after_cuts_later_rows_and_half_a_line(run, step, kept):
    for row in (0, 1, 2, 2, 3):
        run.append(EVAL, {"step": row})
    whole = (run.path / EVAL).read_bytes()
    (run.path / EVAL).open("ab").write(b'{"step": 1, "half')
    run.forget_after(step)
    assert [row["step"] for row in run.read(EVAL)] == kept
    assert whole.startswith((run.path / EVAL).read_bytes())


def test_a_whole_file_is_the_old_or_the_new_one(run):
    run.write("README.md", "old")
    with pytest.raises(UnicodeEncodeError):
        run.write("README.md", "new \ud800")
    assert (run.path / "README.md").read_text() == "old"
    run.write("README.md", b"new")
    assert (run.path / "README.md").read_text() == "new"


def test_a_checkpoint_is_complete_or_absent(run):
    write_checkpoint(run, 0)

    def fails(folder: Path) -> None:
        (folder / "weights").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(CannotWriteError, match=r"No space left on device.*goes on from step-000000\.$"):
        run.write_checkpoint(1, fails)
    assert [path.name for path in (run.path / "checkpoints").iterdir()] == ["step-000000"]


def test_an_unfinished_checkpoint_is_none_and_is_removed(run):
    write_checkpoint(run, 2)
    (run.path / "checkpoints" / ".step-000004.tmp").mkdir()
    assert [step for step, _ in run.checkpoints()] == [2]
    run.keep_only(2)
    assert [path.name for path in (run.path / "checkpoints").iterdir()] == ["step-000002"]


def test_checkpoints_are_ordered_by_step_beyond_six_digits(run):
    write_checkpoint(run, 1_000_000, 20, 3)
    assert [step for step, _ in run.checkpoints()] == [3, 20, 1_000_000]


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ({0: 0.1, 2: 0.5, 4: 0.3}, 2),
        ({0: 0.5, 2: 0.5, 4: 0.3}, 0),
        ({0: 0.1, 2: 0.2, 4: 0.3, 6: 0.9}, 4),
        ({}, 4),
        ({0: 0.0}, 0),
    ],
)
def test_best_checkpoint_is_the_earliest_of_the_highest_that_is_there(run, scores, best):
    write_checkpoint(run, 0, 2, 4)
    validated(run, scores)
    assert run.best_checkpoint() == (best, run.checkpoint(best))


def test_no_checkpoint(run):
    with pytest.raises(ValueError, match="holds no checkpoint; give the directory of a run that has written one"):
        run.best_checkpoint()


def test_keep_only(run):
    write_checkpoint(run, 0, 2, 4)
    run.keep_only(4, 0)
    assert [step for step, _ in run.checkpoints()] == [0, 4]


# --- is there a run already? ------------------------------------------------------------------------------------------


def test_a_free_place(tmp_path):
    run = RunDirectory(tmp_path / "a" / "b")
    run.require_free(overwrite=False)
    run.create()
    for name in (".run.json.tmp", "run.json", ".config.toml.tmp"):  # killed while the first files were written
        (run.path / name).touch()
        run.require_free(overwrite=False)


def test_a_run_is_only_replaced_with_overwrite(run):
    with pytest.raises(ValueError, match="exists already; use --resume to go on with it, --overwrite to delete it"):
        run.require_free(overwrite=False)
    run.require_free(overwrite=True)
    assert run.exists()
    run.create()
    assert list(run.path.iterdir()) == []


def test_what_is_no_run_is_never_replaced(tmp_path):
    (tmp_path / "notes.txt").touch()
    (tmp_path / "config.toml").touch()
    for path in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(ValueError, match="exists and is not a run directory; choose another run_dir"):
            RunDirectory(path).require_free(overwrite=True)


def test_an_unwritable_place_names_what_to_do(run):
    (run.path / METRICS).mkdir()
    with pytest.raises(CannotWriteError, match=r"cannot be written .*or choose another run_dir\.$"):
        run.append(METRICS, {"step": 1})
    write_checkpoint(run, 3)
    with pytest.raises(CannotWriteError, match=r"then `rlad train .* --resume` goes on from step-000003\.$"):
        run.append(METRICS, {"step": 1})


def test_rows_are_one_line_of_json_each(run):
    run.append(SAMPLES, {"step": 1, "text": "line\nline"})
    (line,) = (run.path / SAMPLES).read_text().splitlines()
    assert json.loads(line) == {"step": 1, "text": "line\nline"}
