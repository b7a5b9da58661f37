"""The folder from which servers read a student's weights."""

import fcntl
import time
from contextlib import suppress
from pathlib import Path
from shutil import rmtree
from tempfile import gettempdir, mkdtemp

from rlad.errors import UserError
from rlad.text import first_line

PREFIX = "rlad-weights-"
LOCK = "lock"
NEW_SECONDS = 60.0
"""After this time a folder is locked, if its process is alive."""


class WeightsFolder:
    """A new folder of a run: a temporary one, or one inside a given directory."""

    def __init__(self, directory: str | None, run: str):
        """Make the folder. Raises `UserError` if that fails. Temporary folders that killed
        processes have left are deleted first."""
        if directory is None:
            _delete_left_ones()
            self.path = Path(mkdtemp(prefix=PREFIX))
        else:
            self.path = Path(directory).absolute() / f"{PREFIX}{run}"
        try:
            self.path.mkdir(exist_ok=directory is None)
            # The lock ends with the process, even if it is killed.
            self._lock = (self.path / LOCK).open("w")
        except OSError as error:
            raise UserError(
                f"rollout.vllm.weights_directory = {directory!r} cannot be written "
                f"({first_line(error)}); give a folder that this run and the servers reach."
            ) from None
        with suppress(OSError):  # A shared file system may have no locks; nothing is deleted there.
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def delete(self) -> None:
        rmtree(self.path, ignore_errors=True)
        self._lock.close()


def _delete_left_ones() -> None:
    """Delete the temporary folders that no process uses any more."""
    for folder in Path(gettempdir()).glob(f"{PREFIX}*"):
        with suppress(OSError):  # it belongs to another user, or is in use
            if time.time() - folder.stat().st_mtime < NEW_SECONDS:
                continue
            with (folder / LOCK).open("rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                rmtree(folder)
