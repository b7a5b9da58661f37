"""The run directory: rows that survive a half-written line, checkpoints that are complete or
absent, which one is best."""

import hashlib
import json
import math
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import rlad
from rlad.runs.checkpoints import MANIFEST, damage
from rlad.runs.directory import EVAL, LOCK, METRICS, ROWS, SAMPLES, CannotWriteError, RunDirectory


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    directory = RunDirectory(tmp_path / "run")
    directory.path.mkdir()
    directory.write("run.json", "{}")
    directory.write("config.toml", "seed = 0\n")
    return directory


def write_checkpoint(run: RunDirectory, *steps: int, with_rollouts: bool = False) -> None:
    def write(folder: Path) -> None:
        (folder / "trainer").mkdir()
        (folder / "weights").write_text("w")
        (folder / "trainer" / "state").write_text("s")

    for step in steps:
        run.write_checkpoint(step, write, run_digest="d", with_rollouts=with_rollouts)


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


@pytest.mark.parametrize("name", ROWS)
def test_the_last_line_cut_at_every_byte(run, name):
    """Every JSONL file reads as the rows before it, and is whole again when the run has gone on."""
    rows = [
        {"step": 1, "x": 1.5},
        {"step": 2, "text": 'a\n"b"\u2028 ü', "nan": None, "more": [{"y": -1e-300}]},
    ]
    for row in rows:
        run.append(name, row)
    whole = (run.path / name).read_bytes()
    start = whole.index(b"\n") + 1
    for end in range(start, len(whole)):
        (run.path / name).write_bytes(whole[:end])
        assert list(run.read(name)) == rows[:1], end
        run.forget_after(2)
        assert (run.path / name).read_bytes() == whole[:start], end
        run.append(name, rows[1])
        assert (run.path / name).read_bytes() == whole, end


@pytest.mark.parametrize(
    "line",
    [b"\x00\x00\n", b"{]\n", b"3\n", b'{"reward": 1}\n', b"\xff\xfe\n", b"[" * 100_000 + b"\n"],
)
def test_any_other_damaged_line_is_named(run, line):
    run.append(METRICS, {"step": 1})
    with (run.path / METRICS).open("ab") as file:
        file.write(line + b'{"step": 3}\n')
    for reads in (lambda: list(run.read(METRICS)), lambda: run.forget_after(2)):
        with pytest.raises(
            ValueError,
            match=r"line 2 of .*metrics\.jsonl is not a row that a run has written; put back",
        ):
            reads()
    assert (run.path / METRICS).read_bytes().endswith(b'{"step": 3}\n')


@pytest.mark.parametrize(
    ("step", "kept"), [(-1, []), (0, [0]), (2, [0, 1, 2, 2]), (9, [0, 1, 2, 2, 3])]
)
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

    with pytest.raises(
        CannotWriteError, match=r"No space left on device.*continues from step-000000\.$"
    ):
        run.write_checkpoint(1, fails, run_digest="d")
    assert [path.name for path in (run.path / "checkpoints").iterdir()] == ["step-000000"]


def test_an_unfinished_checkpoint_is_none_and_is_removed(run):
    write_checkpoint(run, 2)
    (run.path / "checkpoints" / ".step-000004.tmp").mkdir()
    assert [step for step, _ in run.checkpoints()] == [2]
    validated(run, {2: 0.5})
    run.keep(last=1, best=0)
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
    with pytest.raises(
        ValueError, match="holds no checkpoint; give the directory of a run that has written one"
    ):
        run.best_checkpoint()


@pytest.mark.parametrize(
    ("last", "best", "kept"),
    [
        (1, 0, [8]),
        (1, 1, [2, 8]),
        (2, 1, [2, 6, 8]),
        (1, 2, [2, 4, 8]),
        (2, 3, [2, 4, 6, 8]),
        (9, 0, [0, 2, 4, 6, 8]),
    ],
)
def test_keep_the_last_and_the_best(run, last, best, kept):
    """Of equals the earliest; what was written between two validations goes."""
    write_checkpoint(run, 0, 2, 3, 4, 6, 8)
    write_checkpoint(run, 2, with_rollouts=True)
    validated(run, {0: 0.1, 2: 0.6, 4: 0.6, 6: 0.2, 8: 0.1})
    run.keep(last=last, best=best)
    assert [path.name for _, path in run.checkpoints()] == [f"step-{step:06d}" for step in kept]


def test_with_the_next_rollouts_is_newer(run):
    write_checkpoint(run, 4, with_rollouts=True)
    write_checkpoint(run, 4, 2)
    assert [path.name for _, path in run.checkpoints()] == [
        "step-000002",
        "step-000004",
        "step-000004-rollouts",
    ]
    assert run.newest_checkpoint() == (4, run.checkpoint(4, with_rollouts=True))


# --- damaged checkpoints --------------------------------------------------------------------------


def test_the_manifest_names_every_file_with_size_and_checksum(run):
    write_checkpoint(run, 3)
    manifest = json.loads((run.checkpoint(3) / MANIFEST).read_text())
    assert (manifest["step"], manifest["run"], manifest["rlad"]) == (3, "d", rlad.__version__)
    assert manifest["files"] == {
        name: {"size": 1, "sha256": hashlib.sha256(text).hexdigest()}
        for name, text in (("trainer/state", b"s"), ("weights", b"w"))
    }
    assert damage(run.checkpoint(3)) is None


def change_manifest(folder: Path, **files: dict[str, Any]) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"files": manifest["files"] | files}))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (
        lambda folder: (folder / "weights").write_text(""),
        "weights has 0 bytes instead of 1",
    ),
    "a bit flipped": (
        lambda folder: (folder / "weights").write_text("v"),
        "weights has other content than was written",
    ),
    "half deleted": (
        lambda folder: (folder / "trainer" / "state").unlink(),
        "trainer/state is missing",
    ),
    "a folder in its place": (
        lambda folder: ((folder / "weights").unlink(), (folder / "weights").mkdir()),
        "weights is missing",
    ),
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), r"it has no manifest\.json"),
    "half a manifest": (
        lambda folder: os.truncate(folder / MANIFEST, 20),
        r"manifest\.json is not what was written",
    ),
    "an empty manifest": (
        lambda folder: (folder / MANIFEST).write_text("[]"),
        r"manifest\.json is not what was written",
    ),
    "a manifest that looks elsewhere": (
        lambda folder: change_manifest(folder, **{"../../../secret": {"size": 1, "sha256": ""}}),
        r"\.\./\.\./\.\./secret is outside of it",
    ),
    "a manifest that names a device": (
        lambda folder: change_manifest(folder, **{"/dev/zero": {"size": 0, "sha256": ""}}),
        "/dev/zero is outside of it",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_passed_over(run, name, caplog):
    do_damage, reason = DAMAGES[name]
    write_checkpoint(run, 2, 4)
    validated(run, {2: 0.1, 4: 0.9})
    do_damage(run.checkpoint(4))
    for chosen in (run.newest_checkpoint, run.best_checkpoint):
        caplog.clear()
        assert chosen() == (2, run.checkpoint(2))
        (record,) = caplog.records
        assert re.search(
            f"step-000004 is damaged: {reason}; it is skipped, and step-000002 taken",
            record.getMessage(),
        )
    assert run.checkpoint(4).is_dir()
    do_damage(run.checkpoint(2))
    with pytest.raises(
        ValueError,
        match=rf"holds no checkpoint that is whole \(step-000004 is damaged: {reason}; step-000002",
    ):
        run.newest_checkpoint()


def test_damaged_checkpoints_are_set_aside_and_kept(run):
    write_checkpoint(run, 2, 4, 6)
    run.set_aside_after(run.checkpoint(2))
    write_checkpoint(run, 4)
    run.set_aside_after(run.checkpoint(2))
    names = sorted(path.name for path in (run.path / "checkpoints").iterdir())
    assert names == [
        "damaged-step-000004",
        "damaged-step-000004-2",
        "damaged-step-000006",
        "step-000002",
    ]


# --- is there a run already? ----------------------------------------------------------------------


def test_a_free_place(tmp_path):
    run = RunDirectory(tmp_path / "a" / "b")
    run.require_free(overwrite=False)
    run.path.mkdir(parents=True, exist_ok=True)
    for name in (
        ".run.json.tmp",
        "run.json",
        ".config.toml.tmp",
    ):  # killed while the first files were written
        (run.path / name).touch()
        run.require_free(overwrite=False)


def test_a_run_is_only_replaced_with_overwrite(run):
    with pytest.raises(
        ValueError, match="exists already; use --resume to continue it, --overwrite to delete it"
    ):
        run.require_free(overwrite=False)
    run.require_free(overwrite=True)
    assert run.exists()
    write_checkpoint(run, 1)
    with run.locked():
        run.clear()
        assert [path.name for path in run.path.iterdir()] == [LOCK]


def test_who_asks_whether_a_run_is_going_on_does_not_keep_one_from_beginning(run):
    """One process asks without a pause, as `rlad doctor` does; the other begins a run 10,000
    times."""
    assert not run.is_locked(), "there is no lock yet"
    with run.locked():
        assert run.is_locked()
    asking = os.fork()
    if asking == 0:
        while True:
            run.is_locked()
    try:
        for _ in range(10_000):
            with run.locked():
                pass
    finally:
        os.kill(asking, signal.SIGKILL)
        os.waitpid(asking, 0)
    assert not run.is_locked()


def test_what_is_no_run_is_never_replaced(tmp_path):
    (tmp_path / "notes.txt").touch()
    (tmp_path / "config.toml").touch()
    for path in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(
            ValueError, match="exists and is not a run directory; choose another run_dir"
        ):
            RunDirectory(path).require_free(overwrite=True)


def test_an_unwritable_place_names_what_to_do(run):
    (run.path / METRICS).mkdir()
    with pytest.raises(CannotWriteError, match=r"cannot be written .*or choose another run_dir\.$"):
        run.append(METRICS, {"step": 1})
    write_checkpoint(run, 3)
    with pytest.raises(
        CannotWriteError, match=r"then `rlad train .* --resume` continues from step-000003\.$"
    ):
        run.append(METRICS, {"step": 1})


def test_rows_are_one_line_of_json_each(run):
    run.append(SAMPLES, {"step": 1, "text": "line\nline"})
    (line,) = (run.path / SAMPLES).read_text().splitlines()
    assert json.loads(line) == {"step": 1, "text": "line\nline"}


def write_weights(folder: Path) -> None:
    (folder / "weights").write_text("whole")


def test_the_only_checkpoint_of_a_validated_step_is_kept_with_its_rollouts(tmp_path):
    run = RunDirectory(tmp_path)
    validated(run, {0: 0.1, 1: 0.2, 2: 0.0, 3: 0.0})
    for step in (0, 2, 3):
        run.write_checkpoint(step, write_weights, run_digest="d")
    run.write_checkpoint(1, write_weights, run_digest="d", with_rollouts=True)
    run.keep(last=1, best=1)
    assert [path.name for _, path in run.checkpoints()] == ["step-000001-rollouts", "step-000003"]


def test_the_newest_checkpoint_is_never_deleted(tmp_path):
    run = RunDirectory(tmp_path)
    validated(run, {0: 0.1, 1: 0.2})
    for step in (0, 1):
        run.write_checkpoint(step, write_weights, run_digest="d")
    run.write_checkpoint(1, write_weights, run_digest="d", with_rollouts=True)
    run.keep(last=1, best=1)
    assert [path.name for _, path in run.checkpoints()] == ["step-000001", "step-000001-rollouts"]


def test_a_damaged_checkpoint_does_not_take_the_place_of_a_whole_one_of_its_step(tmp_path):
    run = RunDirectory(tmp_path)
    validated(run, {10: 0.2, 20: 0.3})
    for step in (10, 20):
        run.write_checkpoint(step, write_weights, run_digest="d")
    run.write_checkpoint(20, write_weights, run_digest="d", with_rollouts=True)
    (run.checkpoint(20) / "weights").write_text("other")
    newest = run.newest_checkpoint()[1]
    run.set_aside_after(newest)
    run.keep(last=1, best=1)
    assert [path.name for _, path in run.checkpoints()] == ["step-000020-rollouts"] == [newest.name]
    assert (tmp_path / "checkpoints" / "damaged-step-000020").is_dir()
