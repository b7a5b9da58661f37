"""The run directory: what a run writes, and how it is read again.

config.toml           the resolved config; `rlad train config.toml` repeats the run
run.json              versions, commit, machine, seed
metrics.jsonl         one row per optimiser step
eval.jsonl            one row per validation or test
samples.jsonl         graded completions of some prompts
checkpoints/step-N/   a Hugging Face model folder, with `trainer/` beside the weights for resuming
best.json             which checkpoint validates best
curve.png, README.md  the learning curve and the model card
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

METRICS, EVAL, SAMPLES = "metrics.jsonl", "eval.jsonl", "samples.jsonl"


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """A run directory on disk. Every write goes through here."""

    path: Path

    @classmethod
    def create(cls, path: Path, *, overwrite: bool) -> "RunDirectory":
        """An empty run directory. `ValueError` when there is something already, unless `overwrite` deletes that run."""
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            if path.is_dir() and not (path / "config.toml").is_file():
                raise ValueError(f"{path} exists and is not a run directory; choose another run_dir.")
            if not overwrite or not path.is_dir():
                raise ValueError(
                    f"run directory {path} exists already; use --resume to go on, --overwrite to delete it and start "
                    "again, or run_dir=... for another place."
                )
            shutil.rmtree(path)
        (path / "checkpoints").mkdir(parents=True, exist_ok=True)
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> "RunDirectory":
        """An existing run. `ValueError` when `path` is none."""
        if not (path / "config.toml").is_file():
            raise ValueError(
                f"{path} is not a run directory (it has no config.toml); give the directory that `rlad train` named."
            )
        return cls(path)

    def write_text(self, name: str, text: str) -> None:
        """Write a whole file at once: it is either the old one or the new one, never half of it."""
        target = self.path / name
        aside = target.with_name(f".{target.name}.tmp")
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, target)

    def append(self, name: str, *rows: dict[str, Any]) -> None:
        """Add rows to a JSONL file and flush them."""
        with (self.path / name).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, allow_nan=True) + "\n" for row in rows)

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
        """Drop the rows of later steps: a run resumed at `step` writes them again."""
        for name in (METRICS, EVAL, SAMPLES):
            if (self.path / name).is_file():
                kept = [row for row in self.read(name) if row["step"] <= step]
                self.write_text(name, "".join(json.dumps(row) + "\n" for row in kept))

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def checkpoint(self, step: int) -> Path:
        return self.path / "checkpoints" / f"step-{step:06d}"

    def checkpoints(self) -> list[tuple[int, Path]]:
        """(step, folder) of every complete checkpoint, oldest first."""
        found = [p for p in (self.path / "checkpoints").glob("step-*") if p.is_dir()]
        return sorted((int(p.name.removeprefix("step-")), p) for p in found)

    def last_checkpoint(self) -> tuple[int, Path]:
        """(step, folder) of the newest checkpoint. `ValueError` when there is none."""
        checkpoints = self.checkpoints()
        if not checkpoints:
            raise ValueError(f"{self.path} holds no checkpoint; start the run again with --overwrite.")
        return checkpoints[-1]

    def write_checkpoint(self, step: int, write: Callable[[Path], None]) -> Path:
        """Let `write` fill a folder aside, then rename it: a checkpoint is complete or absent. Errors leave the others alone."""
        target = self.checkpoint(step)
        aside = target.with_name(f".{target.name}.tmp")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        try:
            write(aside)
            for file in aside.rglob("*"):
                if file.is_file():
                    _flush(file)
            if target.exists():
                shutil.rmtree(target)
            os.replace(aside, target)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        return target

    def best_step(self) -> int | None:
        path = self.path / "best.json"
        return json.loads(path.read_text(encoding="utf-8"))["step"] if path.is_file() else None

    def keep_only(self, *steps: int | None) -> None:
        """Delete all checkpoints but these."""
        for step, path in self.checkpoints():
            if step not in steps:
                shutil.rmtree(path)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
