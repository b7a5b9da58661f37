"""What is left of the folders through which servers get weights."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from rlad.errors import UserError
from rlad.rollouts.weights_folder import NEW_SECONDS, WeightsFolder

MAKE_AND_DIE = """
import os, signal
from rlad.rollouts.weights_folder import WeightsFolder
folder = WeightsFolder(None, "run")
(folder.path / "run-1").mkdir()
print(folder.path, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_next_run_deletes_what_killed_ones_have_left(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", MAKE_AND_DIE]
    killed = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    left = Path(killed.stdout.strip())
    held = WeightsFolder(None, "held")
    foreign = tmp_path / "rlad-weights-without-lock"
    foreign.mkdir()
    assert left.is_dir()  # it is new
    for folder in (left, held.path, foreign):
        then = folder.stat().st_mtime - 2 * NEW_SECONDS
        os.utime(folder, (then, then))
    new = WeightsFolder(None, "new")
    assert {*tmp_path.iterdir()} == {held.path, foreign, new.path}
    for _ in range(2):  # once more does no harm
        new.delete()
    assert {*tmp_path.iterdir()} == {held.path, foreign}


def test_a_directory_is_that_of_the_settings(tmp_path) -> None:
    folder = WeightsFolder(str(tmp_path), "a")
    assert folder.path == tmp_path / "rlad-weights-a"
    folder.delete()
    assert not [*tmp_path.iterdir()]
    with pytest.raises(UserError, match="cannot be written"):
        WeightsFolder(str(tmp_path / "none"), "a")
