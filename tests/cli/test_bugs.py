"""A bug is not a user's mistake: it keeps its traceback, and the exit code is 1."""

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import rlad.tasks.verifiers
from rlad.cli.main import main
from rlad.engines.native.loop import NativeEngine
from rlad.errors import RladError, RunFailedError, UserError
from rlad.teachers.local import LocalTeacher
from tiny_runs import run_config, write_config


@pytest.fixture
def toml(world: Path, tmp_path: Path) -> Path:
    return write_config(tmp_path / "run.toml", run_config(world, tmp_path / "run"))


def zip_of_unequal_lengths(*arguments: Any, **settings: Any) -> None:
    list(zip([1], [1, 2], strict=True))


def index_out_of_range(*arguments: Any, **settings: Any) -> None:
    [].pop()


def unpacking(*arguments: Any, **settings: Any) -> None:
    _first, _second = (1, 2, 3)


@pytest.mark.parametrize("bug", [zip_of_unequal_lengths, index_out_of_range, unpacking])
@pytest.mark.parametrize(
    ("place", "name"),
    [
        (NativeEngine, "update"),
        (rlad.tasks.verifiers, "import_function"),
        (LocalTeacher, "submit"),
    ],
    ids=["engine", "loading a verifier", "teacher"],
)
def test_a_bug_keeps_its_traceback(toml, monkeypatch, place, name, bug):
    monkeypatch.setattr(place, name, bug)
    result = CliRunner().invoke(
        main, ["train", str(toml), "task.verifier=run_verifiers:nan_for_long"]
    )
    assert result.exit_code == 1
    assert result.stderr.startswith("Traceback (most recent call last):")
    assert f"in {bug.__name__}" in result.stderr
    *_, error, last = result.stderr.splitlines()
    assert error.startswith(("ValueError: ", "IndexError: "))
    assert last.startswith("This is a bug in rlad") and "issue tracker" in last
    assert "rlad: " not in result.stderr  # which begins the sentence of a user's mistake


@pytest.mark.parametrize(("error", "code"), [(UserError, 2), (RunFailedError, 1), (RladError, 1)])
def test_an_error_of_ours_is_its_sentence(toml, monkeypatch, error, code):
    def fail(*arguments: Any, **settings: Any) -> None:
        raise error("the disk is on fire; put it out.")

    monkeypatch.setattr(NativeEngine, "update", fail)
    result = CliRunner().invoke(main, ["train", str(toml)])
    assert (result.exit_code, result.stderr) == (code, "rlad: the disk is on fire; put it out.\n")


def test_ctrl_c_outside_of_a_run(toml, monkeypatch):
    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rlad.config.file.load_config", interrupt)
    result = CliRunner().invoke(main, ["check", str(toml)])
    assert (result.exit_code, result.stderr) == (128 + signal.SIGINT, "rlad: interrupted\n")


def test_a_closed_pipe_is_no_bug():
    command = [sys.executable, "-m", "rlad", "list", "settings"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert b"Traceback" not in process.stderr.read()
