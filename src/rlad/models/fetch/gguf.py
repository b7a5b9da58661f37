"""From a GGUF file to a folder that transformers, PEFT and vLLM load. Needs the optional package
gguf."""

import importlib.util
import io
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlad.errors import UserError


def require_gguf(name: str) -> None:
    """`UserError` unless gguf is installed; preparing model `name` needs it."""
    if importlib.util.find_spec("gguf") is None:
        raise UserError(
            f"model {name!r} is converted with the package gguf, which is not installed; pip "
            "install 'rlad[gguf]'."
        )


def convert_gguf(file: Path, folder: Path) -> None:
    """Writes tokenizer, config and float32 weights; the reloaded model's logits equal those of the
    GGUF file bit for bit."""
    source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    with redirect_stderr(io.StringIO()):  # where transformers draws bars of its own
        quantised: Any = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        config = quantised.config
        del config.quantization_config  # a model that was loaded from GGUF refuses to be saved
        model = type(quantised)(config)
        model.load_state_dict(quantised.state_dict(), strict=True)
        model.generation_config = quantised.generation_config
        AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
        model.save_pretrained(folder)
