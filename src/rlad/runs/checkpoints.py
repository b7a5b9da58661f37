"""Checkpoints on disk. Each is complete or absent, and damage can be detected.

step-000020/            the state after step 20
step-000020-rollouts/   the same with the rollouts of the next step, written at a signal or by time
    manifest.json       {"rlad": version, "step": 20, "run": digest,
                         "files": {name: {"size": bytes, "sha256": hex digits}}}
damaged-step-000020/    a checkpoint that a resumed run found damaged and did not continue from
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
_NAME = re.compile(r"step-([0-9]+)(-rollouts)?")


def find_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """List (step, folder) of the complete checkpoints in a folder, damaged or not, oldest first."""
    found = []
    for path in folder.glob("step-*"):
        match = _NAME.fullmatch(path.name)
        if match and path.is_dir() and not path.is_symlink():
            found.append((int(match[1]), path))
    return sorted(found)


def write_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary folder, flush all of it to disk, then rename it to `target`.

    Even if it fails or is interrupted, `target` is complete or absent.
    """
    # A rename is atomic, but after a power cut a renamed folder may have empty files. So every file
    # and every directory is flushed to disk before the rename. The temporary name begins with a
    # dot, so a search for `step-*` does not find the folder while it is written.
    aside = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        write(aside)
        for written in aside.rglob("*"):
            # safetensors files are readable only by the owner; make them as readable as the folder.
            if written.is_file():
                written.chmod(aside.stat().st_mode & 0o666)
            flush(written)
        flush(aside)
        # The new name is safe only once the parent directory is flushed too.
        os.replace(aside, target)
        flush(target.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def write_manifest(folder: Path, **about: Any) -> None:
    """Write size and checksum of every file in a folder."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    files = {
        name: {"size": (folder / name).stat().st_size, "sha256": _checksum(folder / name)}
        for name in names
    }
    files.pop(MANIFEST, None)
    text = json.dumps({"rlad": metadata.version("rlad"), **about, "files": files}, indent=1)
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def damage(checkpoint: Path) -> str | None:
    """Say in a few words how a checkpoint is damaged; None if every file is as it was written.
    Reads all of it."""
    try:
        # Lazily, since the files are large and the first damaged one decides.
        files = dict(json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"])
        found = (
            (name, _damage_of_file(checkpoint / name, checkpoint, **noted))
            for name, noted in files.items()
        )
        return next((f"{name} {reason}" for name, reason in found if reason), None)
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (ValueError, KeyError, TypeError, RecursionError):
        return f"{MANIFEST} is not what was written"
    except OSError as error:
        return f"it cannot be read: {error.strerror}"


def _damage_of_file(path: Path, checkpoint: Path, *, size: int, sha256: str) -> str | None:
    # A foreign manifest must not make us read files outside the folder. Cheap checks come first.
    if not path.resolve().is_relative_to(checkpoint.resolve()):
        return "is outside of it"
    if not path.is_file():
        return "is missing"
    if (found := path.stat().st_size) != size:
        return f"has {found} bytes instead of {size}"
    return None if _checksum(path) == sha256 else "has other content than was written"


def delete_checkpoint(path: Path) -> None:
    """Rename a checkpoint, then delete it, so that a half-deleted folder is never mistaken for a
    checkpoint."""
    delete_unfinished(path.parent)
    os.replace(path, path.with_name(f".{path.name}.tmp"))
    delete_unfinished(path.parent)


def delete_unfinished(folder: Path) -> None:
    """Delete remains of checkpoints that were being written or deleted when a process was
    killed."""
    for path in folder.glob(".step-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint, so that a new one can replace it; return its new path."""
    aside = path.with_name(f"damaged-{path.name}")
    number = 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"damaged-{path.name}-{number}")
    os.replace(path, aside)
    return aside


def flush(path: Path) -> None:
    """Flush a file, or a directory's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
