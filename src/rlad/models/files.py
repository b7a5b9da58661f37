"""A model's folder, embedded, prepared, own or an adapter's, and what it says of itself. Imports no
torch, no transformers.

`plain_config` and `num_stored_weights` answer where the files alone say what transformers would,
and None everywhere else: then it is for transformers to say.
"""

import importlib.util
import json
from collections.abc import Sequence
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from safetensors import SafetensorError, safe_open

from rlad.errors import UserError
from rlad.models.packaged import prepared_folder

EMBEDDED = {
    name: Path(__file__).parents[1] / "embedded" / name.removeprefix("embedded/")
    for name in ("embedded/student", "embedded/teacher")
}
ADAPTER_CONFIG = "adapter_config.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_SIZES = (
    "vocab_size", "max_position_embeddings", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
)  # fmt: skip
_FAMILIES = {"llama": _SIZES, "qwen2": _SIZES, "qwen3": (*_SIZES, "head_dim")}
"""what a config.json must state so that transformers adds no size of its own"""
_ELSEWHERE = ("text_config", "auto_map", "quantization_config")
"""sections of a config that change what its other settings mean"""

# --- where it is ------------------------------------------------------------------------------------------------------


def is_adapter(name: str) -> bool:
    """Whether `name` is the folder of an adapter without its base model."""
    folder = Path(name)
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file()


def adapter_base(folder: str) -> str:
    """The base model that an adapter folder names. `UserError` when it names none, or an
    adapter."""
    base = read_adapter_config(folder).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(
            f"adapter {folder!r} does not name its base model; write base_model_name_or_path into "
            f"its {ADAPTER_CONFIG}."
        )
    if is_adapter(base):
        raise UserError(
            f"adapter {folder!r} stands on {base!r}, another adapter; merge that one into its base "
            "model first."
        )
    return base


def read_adapter_config(folder: str) -> dict[str, Any]:
    """The settings in an adapter's folder. `UserError` when they cannot be read."""
    try:
        config = json.loads((Path(folder) / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(unreadable(folder, ADAPTER_CONFIG, error)) from None
    if not isinstance(config, dict):
        raise UserError(unreadable(folder, ADAPTER_CONFIG, "no JSON object"))
    return config


def unreadable(folder: str, file: str, error: object) -> str:
    return f"adapter {folder!r}: its {file} cannot be read ({error}); give a folder that PEFT's `save_pretrained` wrote."


def base_model(name: str) -> str:
    """The model that an adapter's folder stands on; of every other model its own name."""
    return adapter_base(name) if is_adapter(name) else name


def has_tokenizer(folder: str) -> bool:
    """Whether an adapter's folder holds a tokenizer."""
    return is_adapter(folder) and (Path(folder) / "tokenizer_config.json").is_file()


def files_of(name: str) -> Path | str:
    """Where transformers finds a model's own files, or those of the model that an adapter stands
    on."""
    return located(base_model(name))


def located(name: str) -> Path | str:
    """The folder of an embedded or a packaged model; every other name as it is. `UserError` for
    one that is not prepared."""
    return EMBEDDED.get(name) or prepared_folder(name) or name


def has_weights(folder: Path) -> bool:
    """Whether a model folder holds safetensors: the one file, or all that its index names."""
    if (folder / "model.safetensors").is_file():
        return True
    shards = set(
        (read_json(folder / "model.safetensors.index.json").get("weight_map") or {}).values()
    )
    if shards:
        return all((folder / shard).is_file() for shard in shards)
    return any(
        "-of-" not in file.name for file in folder.glob("*.safetensors")
    )  # a shard needs its index


def require_weights(name: str) -> None:
    """`UserError` for a model folder without weights. Says nothing of a Hugging Face name."""
    folder = Path(files_of(name))
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        if pickles := sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES):
            raise UserError(
                f"model folder {name!r} has its weights in {pickles[0]}, a pickle, which may run "
                "code when it is read; convert "
                "it to safetensors, where you trust it, with `save_pretrained`."
            )
        raise UserError(
            f"model folder {name!r} has no *.safetensors file; save its weights there with "
            "`save_pretrained`."
        )


def require_peft(what: str) -> None:
    """`UserError` unless peft is installed; `what` needs it."""
    if importlib.util.find_spec("peft") is None:
        raise UserError(
            f"{what} needs peft, which is not installed; install it with: pip install 'rlad[peft]'."
        )


def resolvable(name: str) -> str:
    """A model's name for adapter_config.json: a folder's full path, found from everywhere; else as
    it is."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name


# --- what it says of itself -------------------------------------------------------------------------------------------


class PlainConfig(SimpleNamespace):
    """A config.json as it stands."""

    def get_text_config(self) -> "PlainConfig":
        return self


def plain_config(name: str) -> PlainConfig | None:
    """The config of a folder's causal language model of a common family that states all its
    sizes."""
    settings = {} if is_adapter(name) else read_json(Path(files_of(name)) / "config.json")
    architectures, sizes = (
        settings.get("architectures"),
        _FAMILIES.get(str(settings.get("model_type"))),
    )
    is_plain = (
        sizes is not None
        and isinstance(architectures, list)
        and any(str(architecture).endswith("ForCausalLM") for architecture in architectures)
        and all(type(settings.get(size)) is int and settings[size] > 0 for size in sizes)
        and settings["hidden_size"] % settings["num_attention_heads"] == 0
        and "eos_token_id" in settings
        and not any(settings.get(section) for section in _ELSEWHERE)
    )
    return PlainConfig(**settings) if is_plain else None


def context_tokens(config: Any) -> int | None:
    """The longest sequence a model was made for; None when it does not say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def end_token_ids(
    config: Any, generation: Any, tokenizer: Any, more: Sequence[str] = ()
) -> tuple[int, ...]:
    """Every end token that a model or its tokenizer declares (chat models have more than one), and
    `more`.

    `UserError` without any, and for one that the tokenizer does not know.
    """
    declared = getattr(generation, "eos_token_id", None)
    declared = (
        getattr(config.get_text_config(), "eos_token_id", None) if declared is None else declared
    )
    ids = [declared] if isinstance(declared, int) else list(declared or [])
    if isinstance(tokenizer.eos_token_id, int):
        ids.append(tokenizer.eos_token_id)
    ids += [token_id(tokenizer, token, "student.end_tokens") for token in more]
    if not ids:
        raise UserError(
            f"model {tokenizer.name_or_path!r} declares no end token; set `eos_token` in its "
            "tokenizer."
        )
    return tuple(dict.fromkeys(ids))


def token_id(tokenizer: Any, token: str, setting: str) -> int:
    """The id of one token by its string. `UserError` when the tokenizer has no such token."""
    found = tokenizer.get_vocab().get(token)
    if found is None:
        raise UserError(
            f"{setting} names {token!r}, which is no single token of {tokenizer.name_or_path!r}; "
            "correct it."
        )
    return found


def num_stored_weights(name: str) -> int | None:
    """How many numbers the weights of a folder's model are, by the headers of its files; tied ones
    once."""
    config, folder = plain_config(name), Path(files_of(name))
    index = read_json(folder / "model.safetensors.index.json").get("weight_map", {})
    files = (
        ["model.safetensors"]
        if (folder / "model.safetensors").is_file()
        else sorted(set(index.values()))
    )
    shapes: dict[str, list[int]] = {}
    try:
        for file in files:
            with safe_open(folder / file, framework="np") as tensors:
                shapes |= {key: tensors.get_slice(key).get_shape() for key in tensors}
    except (OSError, SafetensorError):
        return None
    # Buffers, and a tied output layer that was stored all the same, are no weights of their own.
    is_plain = shapes and all(key.endswith((".weight", ".bias")) for key in shapes)
    if (
        config is None
        or not is_plain
        or (getattr(config, "tie_word_embeddings", True) and "lm_head.weight" in shapes)
    ):
        return None
    return sum(map(prod, shapes.values()))


def read_json(path: Path) -> dict[str, Any]:
    """Empty when there is no such file or it holds something else; transformers says so better."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
