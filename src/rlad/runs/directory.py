"""The run directory: what a run writes, and how to read it.

config.toml           the resolved config; `rlad train config.toml` repeats the run
run.json              versions, commit, machine, seed
metrics.jsonl         one row per optimiser step
eval.jsonl            one row per validation or test
samples.jsonl         graded completions of one prompt per step
warnings.jsonl        the guards' warnings; absent when there are none
skipped-step-N.*      rollouts (JSONL) and scores (safetensors) of the last skipped steps
checkpoints/step-N/   the best and the last few: Hugging Face model folders; `trainer/` is to resume
curve.png, README.md  the learning curve and the model card
tensorboard/, wandb/  the files of these trackers, if they are in [logging]
"""

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice, takewhile
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError

from rlad.errors import RunFailedError, UserError
from rlad.runs.checkpoints import (
    damage,
    delete_checkpoint,
    delete_unfinished,
    find_checkpoints,
    flush,
    set_aside,
    write_folder,
    write_manifest,
)

CONFIG = "config.toml"
ENVIRONMENT = "run.json"
METRICS = "metrics.jsonl"
EVAL = "eval.jsonl"
SAMPLES = "samples.jsonl"
WARNINGS = "warnings.jsonl"
SKILLS = "skills.jsonl"
ROWS = (METRICS, EVAL, SAMPLES, WARNINGS, SKILLS)
"""The JSONL files whose rows all have a step."""
SKIPPED_BATCHES = "skipped-step"
MODEL_CARD = "README.md"
LOCK = ".lock"
CHECKPOINTS = "checkpoints"

EvaluationSet = Literal["validation", "test", "ood"]
"""validation: chooses the best checkpoint; test: reported; ood: test problems outside the training
distribution."""

_log = logging.getLogger(__name__)


class CannotWriteError(RunFailedError):
    """The error for a full disk, missing permission and the like. Earlier files are intact."""


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """A run directory on disk. All writes use it, and raise `CannotWriteError` if they fail."""

    path: Path

    def exists(self) -> bool:
        return all((self.path / name).is_file() for name in (CONFIG, ENVIRONMENT))

    def is_finished(self) -> bool:
        """Return whether the run has finished: the model card is the last file that it writes."""
        return self.exists() and (self.path / MODEL_CARD).is_file()

    def require_free(self, *, overwrite: bool) -> None:
        """Raise `UserError` if something exists already, unless it is a run and `overwrite` is
        set. Deletes nothing."""
        if self.exists() and not overwrite:
            raise UserError(
                f"run directory {self.path} exists already; use --resume to continue it, "
                "--overwrite to delete it and start again, or run_dir=... for another place."
            )
        # A run that was killed while it made its directory may have left its first files.
        is_free = not self.path.exists()
        if self.path.is_dir():
            left = {p.name for p in self.path.iterdir() if not p.name.startswith(".")}
            is_free = left <= {ENVIRONMENT} or self.exists()
        if not is_free:
            raise UserError(
                f"{self.path} exists and is not a run directory; choose another run_dir."
            )

    def clear(self) -> None:
        """Delete everything in the directory except its lock, with the files that identify a run
        last."""
        # If killed halfway, the rest must still count as a run, which --overwrite may clear.
        with self._writing():
            paths = self.path.iterdir()
            for path in sorted(paths, key=lambda path: path.name in (CONFIG, ENVIRONMENT)):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                elif path.name != LOCK:
                    path.unlink()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the directory, and prevent other processes from training here. Raises `UserError` if
        another process already does."""
        # There are two locks: the file's is held as long as the run trains, the directory's only
        # while a process tries to take the file's. Otherwise `is_locked` of another process could
        # briefly hold the file's lock, and a run that starts at that moment would be refused.
        with self._writing():
            self.path.mkdir(parents=True, exist_ok=True)
            file = (self.path / LOCK).open("w")
        # The lock ends with the process, even if it is killed, since the file is closed then.
        with file:
            try:
                with self._one_at_a_time():
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"another process is training in {self.path}; wait until it has ended, or "
                    "choose another run_dir."
                ) from None
            yield

    def is_locked(self) -> bool:
        """Return whether a process is training here."""
        try:
            with self._one_at_a_time(), (self.path / LOCK).open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    @contextmanager
    def _one_at_a_time(self) -> Iterator[None]:
        """Hold the lock of the directory."""
        directory = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(directory, fcntl.LOCK_EX)
            yield
        finally:
            os.close(directory)

    def delete(self, name: str) -> None:
        """Remove a file, if it is there."""
        with self._writing():
            (self.path / name).unlink(missing_ok=True)

    def write(self, name: str, content: str | bytes) -> None:
        """Write a whole file atomically: its content is the old or the new one, never a mixture."""
        aside = self.path / f".{name}.tmp"
        with self._writing():
            aside.write_bytes(content.encode() if isinstance(content, str) else content)
            flush(aside)
            os.replace(aside, self.path / name)

    def append(self, name: str, row: dict[str, Any]) -> None:
        """Add a row to a JSONL file and flush it."""
        with self._writing(), (self.path / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def lines(self, name: str) -> Iterator[Any]:
        """Yield the JSON of each line of a JSONL file, or None for a line that is not JSON.

        Yields nothing if the file does not exist; a half-written last line is left out.
        """
        path = self.path / name
        if not path.is_file():
            return
        with path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    return
                try:
                    yield json.loads(line)
                except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
                    yield None

    def read(self, name: str) -> Iterator[dict[str, Any]]:
        """Yield the rows of a JSONL file, without a half-written last line.

        Raises `UserError` for any other line that is not a row: something else has written there.
        """
        for number, row in enumerate(self.lines(name), start=1):
            if not isinstance(row, dict) or type(row.get("step")) is not int:
                raise UserError(
                    f"line {number} of {self.path / name} is not a row that a run has written; put "
                    "back a copy of that file, or start the run again with --overwrite."
                )
            yield row

    def forget_after(self, step: int) -> None:
        """Remove the rows of later steps, and a half-written last line: a run resumed at `step`
        writes them again."""
        for name in ROWS:
            # Rows are ordered by step, so only the end of the file is cut.
            num_kept = sum(1 for _ in takewhile(lambda row: row["step"] <= step, self.read(name)))
            if (self.path / name).is_file():
                with self._writing(), (self.path / name).open("rb+") as file:
                    file.truncate(sum(len(line) for line in islice(file, num_kept)))

    # --- checkpoints ------------------------------------------------------------------------------

    def checkpoint(self, step: int, *, with_rollouts: bool = False) -> Path:
        return self.path / CHECKPOINTS / f"step-{step:06d}{'-rollouts' if with_rollouts else ''}"

    def checkpoints(self) -> list[tuple[int, Path]]:
        """List (step, folder) of every complete checkpoint, damaged or not, oldest first."""
        return find_checkpoints(self.path / CHECKPOINTS)

    def checkpoints_by_validation(self) -> list[tuple[int, Path]]:
        """List the checkpoints by validation pass@1, best first, ties by the earliest; then those
        without one, newest first."""
        scores = self._validations()
        validated = [found for found in self.checkpoints() if found[0] in scores]
        rest = [found for found in reversed(self.checkpoints()) if found[0] not in scores]
        return sorted(validated, key=lambda found: (-scores[found[0]], found)) + rest

    def newest_checkpoint(self) -> tuple[int, Path]:
        """Find (step, folder) of the newest intact checkpoint. A damaged one is skipped with a
        warning. Raises `UserError` if none is intact."""
        return self._first_whole(self.checkpoints()[::-1])

    def best_checkpoint(self) -> tuple[int, Path]:
        """Find the intact checkpoint with the highest validation pass@1 in the same way, or the
        newest if none has been validated."""
        return self._first_whole(self.checkpoints_by_validation())

    def _first_whole(self, candidates: Sequence[tuple[int, Path]]) -> tuple[int, Path]:
        if not candidates:
            raise UserError(
                f"{self.path} holds no checkpoint; give the directory of a run that has written "
                "one."
            )
        damaged: list[str] = []
        for step, path in candidates:
            reason = damage(path)
            if reason is None:
                for each in damaged:
                    _log.warning(
                        "checkpoint %s/%s; it is skipped, and %s taken", self.path, each, path.name
                    )
                return step, path
            damaged.append(f"{path.name} is damaged: {reason}")
        raise UserError(
            f"{self.path} holds no checkpoint that is whole ({'; '.join(damaged)}); put back a "
            "copy of one, or start the run again with --overwrite."
        )

    def write_checkpoint(
        self,
        step: int,
        write: Callable[[Path], None],
        *,
        run_digest: str,
        with_rollouts: bool = False,
    ) -> None:
        """Let `write` fill a new checkpoint, which is complete or absent. Earlier rows are flushed
        to disk first."""

        def write_all(folder: Path) -> None:
            write(folder)
            write_manifest(folder, step=step, run=run_digest)

        with self._writing():
            # After a crash, a step's checkpoint must not exist without its rows.
            for name in ROWS:
                if (self.path / name).is_file():
                    flush(self.path / name)
            write_folder(self.checkpoint(step, with_rollouts=with_rollouts), write_all)

    def set_aside_after(self, checkpoint: Path) -> None:
        """Rename the checkpoints newer than this one, which are all damaged, to `damaged-...`.

        A damaged one of the same step is renamed too: it would be kept instead of this one.
        """
        found = {path: step for step, path in self.checkpoints()}
        with self._writing():
            for path, step in found.items():
                is_twin = step == found[checkpoint] and path != checkpoint
                if step > found[checkpoint] or (is_twin and damage(path)):
                    set_aside(path)

    def keep(self, *, last: int, best: int) -> None:
        """Delete all checkpoints except the last and the best of the validated ones, and remains of
        unfinished ones.

        Checkpoints written at a signal or by time in between are deleted too. The newest of all
        stays, since a run continues from it.
        """
        # For each step, prefer the checkpoint without rollouts over the one with them.
        of_step: dict[int, Path] = {}
        for step, path in self.checkpoints():
            of_step.setdefault(step, path)
        # The best are chosen among validated steps only, since the quality of others is unknown.
        scores = self._validations()
        validated = [path for step, path in of_step.items() if step in scores]
        by_validation = [path for _, path in self.checkpoints_by_validation() if path in validated]
        kept = validated[-last:] + by_validation[:best]
        with self._writing():
            for _, path in self.checkpoints()[:-1]:
                if path not in kept:
                    delete_checkpoint(path)
            delete_unfinished(self.path / CHECKPOINTS)

    def _validations(self) -> dict[int, float]:
        rows = (row for row in self.read(EVAL) if row.get("split") == "validation")
        return {row["step"]: row["pass@1"]["mean"] for row in rows}

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            kept = self.checkpoints()
            then = "or choose another run_dir"
            if kept:
                last = kept[-1][1].name
                then = f"then `rlad train {self.path} --resume` continues from {last}"
            raise CannotWriteError(
                f"run directory {self.path} cannot be written ({error}); free some space or fix "
                f"its permissions, {then}."
            ) from None
