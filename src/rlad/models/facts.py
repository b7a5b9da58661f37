"""What a check needs to know before there are weights: a model's sizes and tokenizer, a device.

Imports torch and transformers, which takes seconds, only where files leave something open.
"""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from rlad.models.files import files_of, plain_config, read_json
from rlad.models.plain_tokenizer import AnyTokenizer, plain_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GPU_FILES = ("nvidia*", "nvhost*", "nvmap", "kfd", "dxg")
"""in /dev, one of which every GPU that torch calls `cuda` has on Linux"""
_TOKENIZER_CLASSES = {
    ("llama", "TokenizersBackend"): "TokenizersBackend",
    ("llama", "PreTrainedTokenizerFast"): "TokenizersBackend",
    ("qwen2", "Qwen2Tokenizer"): "Qwen2Tokenizer",
    ("qwen3", "Qwen2Tokenizer"): "Qwen2Tokenizer",
    ("qwen3", "TokenizersBackend"): "TokenizersBackend",
    ("qwen3", "PreTrainedTokenizerFast"): "TokenizersBackend",
}
"""(a model's family, the class that its tokenizer names): the class that transformers'
`AutoTokenizer` takes"""


def config_of(name: str) -> Any:
    """The config of a model, its own or transformers', both with the same names. `UserError` when
    `name` is no model."""
    config = plain_config(name)
    if config is None:
        from rlad.models.loading import load_model_config

        return load_model_config(name)
    return config


def tokenizer_of(name: str) -> AnyTokenizer:
    """A tokenizer for prompts and comparisons. `UserError` when there is none or it cannot be
    loaded."""
    tokenizer = plain_tokenizer(name) or _of_known_class(name)
    if tokenizer is None:
        from rlad.models.loading import load_tokenizer

        return load_tokenizer(name)
    return tokenizer


def _of_known_class(name: str) -> "PreTrainedTokenizerBase | None":
    """A folder's tokenizer as `AutoTokenizer` makes it, where its class is known beforehand:
    choosing it imports torch.

    None elsewhere, and for one that cannot be loaded: `load_tokenizer` says why.
    """
    config, settings = plain_config(name), read_json(Path(files_of(name)) / "tokenizer_config.json")
    chosen = _TOKENIZER_CLASSES.get(
        (str(getattr(config, "model_type", None)), str(settings.get("tokenizer_class")))
    )
    if chosen is None or "auto_map" in settings:
        return None
    import transformers

    try:
        tokenizer = getattr(transformers, chosen).from_pretrained(
            files_of(name), trust_remote_code=False
        )
    except Exception:  # whatever transformers makes of files that are not what they should be
        return None
    return tokenizer if len(tokenizer) else None


def generation_of(name: str) -> Any:
    """The `generation_config.json` of a model, where end tokens stand too; None where there is
    none."""
    folder = Path(files_of(name))
    if folder.is_dir():
        return SimpleNamespace(**read_json(folder / "generation_config.json"))
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(str(folder))
    except OSError:
        return None


def device_name(device: str) -> str:
    """What `rlad.models.loading.pick_device` picks, with its errors."""
    has_no_gpu = sys.platform == "linux" and not any(
        file for name in _GPU_FILES for file in Path("/dev").glob(name)
    )
    if device == "cpu" or (device == "auto" and has_no_gpu):
        return "cpu"
    from rlad.models.loading import pick_device

    return str(pick_device(device))
