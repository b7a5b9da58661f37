"""The run directory: what a run writes, and how it is read again.

config.toml           the resolved config; `rlad train config.toml` repeats the run
run.json              versions, commit, machine, seed
metrics.jsonl         one row per optimiser step
eval.jsonl            one row per validation or test
samples.jsonl         graded completions of one prompt per step
checkpoints/step-N/   the best and the last: a Hugging Face model folder, with `trainer/` beside the weights for resuming
curve.png, README.md  the learning curve and the model card
"""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError

from rlad.errors import RunFailedError

CONFIG, ENVIRONMENT = "config.toml", "run.json"
METRICS, EVAL, SAMPLES = "metrics.jsonl", "eval.jsonl", "samples.jsonl"
MODEL_CARD, LOCK = "README.md", ".lock"

EvaluationSet = Literal["validation", "test", "ood"]
"""validation: chooses the best checkpoint; test: reported; ood: test problems out of the training distribution"""


class CannotWriteError(RunFailedError):
    """Disk full, no permission and the like; what was written before is still there."""


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """A run directory on disk. Every write goes through here, and raises `CannotWriteError` when it fails."""

    path: Path

    def exists(self) -> bool:
        return all((self.path / name).is_file() for name in (CONFIG, ENVIRONMENT))

    def is_finished(self) -> bool:
        """Whether the run came to its end: the model card is the last thing that it writes."""
        return self.exists() and (self.path / MODEL_CARD).is_file()

    def require_free(self, *, overwrite: bool) -> None:
        """`ValueError` when there is something already, unless it is a run and `overwrite` holds. Deletes nothing."""
        if self.exists() and not overwrite:
            raise ValueError(
                f"run directory {self.path} exists already; use --resume to go on with it, --overwrite to delete it and start "
                "again, or run_dir=... for another place."
            )
        # A run that was killed while it made its directory may have left the first of its files.
        left = [p.name for p in self.path.iterdir() if not p.name.startswith(".")] if self.path.is_dir() else []
        is_free = not self.path.exists() or (self.path.is_dir() and left in ([], [ENVIRONMENT]))
        if not (is_free or self.exists()):
            raise ValueError(f"{self.path} exists and is not a run directory; choose another run_dir.")

    def create(self) -> None:
        """Make the directory; the run that is there is deleted."""
        with self._writing():
            if self.exists():
                shutil.rmtree(self.path)
            self.path.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes from training here meanwhile; `ValueError` when one does."""
        with self._writing():
            file = (self.path / LOCK).open("w")
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(
                    f"another process is training in {self.path}; wait until it has ended, or choose another run_dir."
                ) from None
            yield

    def delete(self, name: str) -> None:
        """Remove a file, if it is there."""
        with self._writing():
            (self.path / name).unlink(missing_ok=True)

    def write(self, name: str, content: str | bytes) -> None:
        """Write a whole file at once: it is either the old one or the new one, never half of it."""
        aside = self.path / f".{name}.tmp"
        with self._writing():
            aside.write_bytes(content.encode() if isinstance(content, str) else content)
            os.replace(aside, self.path / name)

    def append(self, name: str, row: dict[str, Any]) -> None:
        """Add a row to a JSONL file and flush it."""
        with self._writing(), (self.path / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def read(self, name: str) -> Iterator[dict[str, Any]]:
        """Rows of a JSONL file; nothing when it does not exist; a half-written last line is passed over."""
        path = self.path / name
        if not path.is_file():
            return
        with path.open(encoding="utf-8") as file:
            for line in file:
                if line.endswith("\n"):
                    yield json.loads(line)

    def forget_after(self, step: int) -> None:
        """Cut off the rows of later steps, and a half-written last line: a run resumed at `step` writes them again."""
        for name in (METRICS, EVAL, SAMPLES):
            if not (self.path / name).is_file():
                continue
            with self._writing(), (self.path / name).open("rb+") as file:
                end = 0
                for line in file:
                    if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                        break
                    end += len(line)
                file.truncate(end)

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def checkpoint(self, step: int) -> Path:
        return self.path / "checkpoints" / f"step-{step:06d}"

    def checkpoints(self) -> list[tuple[int, Path]]:
        """(step, folder) of every complete checkpoint, oldest first."""
        found = [p for p in (self.path / "checkpoints").glob("step-*") if p.is_dir() and p.name[5:].isdecimal()]
        return sorted((int(p.name.removeprefix("step-")), p) for p in found)

    def best_checkpoint(self) -> tuple[int, Path]:
        """(step, folder) of the one with the highest validation pass@1, the earliest of equals; the newest if none has one.

        `ValueError` when there is no checkpoint.
        """
        checkpoints = self.checkpoints()
        if not checkpoints:
            raise ValueError(f"{self.path} holds no checkpoint; give the directory of a run that has written one.")
        scores = {row["step"]: row["pass@1"]["mean"] for row in self.read(EVAL) if row["split"] == "validation"}
        validated = [found for found in checkpoints if found[0] in scores]
        return max(validated, key=lambda found: scores[found[0]]) if validated else checkpoints[-1]

    def write_checkpoint(self, step: int, write: Callable[[Path], None]) -> None:
        """Let `write` fill a folder aside, then rename it: a checkpoint is complete or absent."""
        target = self.checkpoint(step)
        aside = target.with_name(f".{target.name}.tmp")
        shutil.rmtree(aside, ignore_errors=True)
        try:
            with self._writing():
                aside.mkdir(parents=True)
                write(aside)
                for written in (*aside.rglob("*"), aside):
                    _flush(written)
                os.replace(aside, target)
                _flush(target.parent)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise

    def keep_only(self, *steps: int) -> None:
        """Delete all checkpoints but these, and what is left of unfinished ones."""
        for step, path in self.checkpoints():
            if step not in steps:
                # A folder that is only half deleted must not be taken for a checkpoint.
                os.replace(path, path.with_name(f".{path.name}.tmp"))
        for path in (self.path / "checkpoints").glob(".step-*.tmp"):
            shutil.rmtree(path, ignore_errors=True)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            kept = self.checkpoints()
            then = (
                f"then `rlad train {self.path} --resume` goes on from {kept[-1][1].name}"
                if kept
                else "or choose another run_dir"
            )
            raise CannotWriteError(
                f"run directory {self.path} cannot be written ({error}); free some space or mend its permissions, {then}."
            ) from None


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
