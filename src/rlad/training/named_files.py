"""The files that a run's settings name. If their content changes, a resumed run would be another
run."""

import hashlib
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

from rlad.config.file import flat
from rlad.config.run import RunConfig
from rlad.errors import UserError
from rlad.runs.directory import ENVIRONMENT, RunDirectory

_DATA = ("path", "validation_path", "test_path", "adapter")
_READ_WHOLE = 2**26
_BLOCK = 2**20


def fingerprints(config: RunConfig) -> dict[str, str]:
    """Hash the files that each setting names on this machine: problems, verifiers, and models that
    are loaded at every start. Names on a hub are left out."""
    return {setting: _digest(path) for setting, path in _named_paths(config)}


def require_same_files(run: RunDirectory, config: RunConfig) -> None:
    """Raise `UserError` if a file has changed since the run began."""
    try:
        began_with = json.loads((run.path / ENVIRONMENT).read_text(encoding="utf-8")).get("files")
    except (OSError, ValueError, AttributeError):
        return  # this error is reported where the file is read for its own sake
    settings = flat(config.model_dump(mode="json"))
    for setting, digest in fingerprints(config).items():
        if (began_with or {}).get(setting, digest) != digest:
            raise UserError(
                f"{setting} = {settings[setting]!r} has changed since the run in {run.path} began: "
                "its content is not the same, so a resumed run would be another one; put the "
                "former content back, or start again with --overwrite."
            )


def _named_paths(config: RunConfig) -> Iterator[tuple[str, Path]]:
    """Yield settings and the files or folders that they name."""
    # A checkpoint has the student. Its initial weights are needed for a leash and with an adapter.
    student_is_loaded = bool(config.student.lora or config.optimization.kl_coef)
    for setting, value in flat(config.model_dump(mode="json")).items():
        key = setting.rpartition(".")[2]
        is_model = key == "model" and (student_is_loaded or setting != "student.model")
        path = None
        if (key in _DATA or is_model) and value:
            path = Path(value)
        elif key == "verifier" and ":" in value:
            path = _module_file(value.partition(":")[0])
        if path is not None and path.exists():
            yield setting, path


def _module_file(module: str) -> Path | None:
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    return Path(found.origin) if found is not None and found.origin else None


def _digest(path: Path) -> str:
    """Hash the content of a file, or names and contents of a folder's visible files."""
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(path.rglob("*")):
        inside = file.relative_to(path)
        if file.is_file() and not any(part.startswith(".") for part in inside.parts):
            digest.update(f"{inside} {file.stat().st_size} ".encode())
            _add(file, digest)
    return digest.hexdigest()


def _add(file: Path, digest: "hashlib._Hash") -> None:
    """Add a file's bytes to a digest; for a file of gigabytes, its size and 64 blocks."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        if size <= _READ_WHOLE:
            digest.update(opened.read())
            return
        for number in range(64):
            opened.seek(number * (size - _BLOCK) // 63)
            digest.update(opened.read(_BLOCK))
