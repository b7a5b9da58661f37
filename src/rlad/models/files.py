"""Find a model's folder from its name: embedded, prepared from a package, the user's own, or an
adapter's. Imports no torch."""

import json
from pathlib import Path
from typing import Any

from rlad.errors import UserError
from rlad.models.packaged import prepared_folder
from rlad.text import looks_like_path

EMBEDDED = {
    name: Path(__file__).parents[1] / "embedded" / name.removeprefix("embedded/")
    for name in ("embedded/student", "embedded/teacher")
}
ADAPTER_CONFIG = "adapter_config.json"


def located(name: str) -> Path | str:
    """Return the folder of an embedded or a packaged model, and any other name unchanged.

    Raises `UserError` for a packaged model that is not prepared.
    """
    return EMBEDDED.get(name) or prepared_folder(name) or name


def files_of(name: str) -> Path | str:
    """Return the location of a model's files, or those of an adapter's base model, for
    transformers."""
    return located(base_model(name))


def resolvable(name: str) -> str:
    """Return a name that works from every working directory: a folder's full path, or the name."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name


# --- adapters -------------------------------------------------------------------------------------


def is_adapter(name: str) -> bool:
    """Return whether `name` is the folder of an adapter without its base model."""
    folder = Path(name)
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file()


def has_tokenizer(folder: str) -> bool:
    """Return whether an adapter's folder has a tokenizer."""
    return is_adapter(folder) and (Path(folder) / "tokenizer_config.json").is_file()


def base_model(name: str) -> str:
    """Return the base model that an adapter's folder names, and any other name unchanged.

    Raises `UserError` if an adapter names none, or another adapter.
    """
    if not is_adapter(name):
        return name
    base = read_adapter_config(name).get("base_model_name_or_path") or ""
    if not base or is_adapter(base):
        raise UserError(
            f"adapter {name!r} names {base!r} as its base model; base_model_name_or_path in its "
            f"{ADAPTER_CONFIG} must be a whole model (an adapter below it must be merged first)."
        )
    return base


def read_adapter_config(folder: str) -> dict[str, Any]:
    """Return the settings in an adapter's folder. Raises `UserError` if they cannot be read."""
    try:
        return dict(json.loads((Path(folder) / ADAPTER_CONFIG).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:  # no file, no JSON, or no table
        raise unreadable_adapter(folder, ADAPTER_CONFIG, error) from None


def unreadable_adapter(folder: str, file: str, error: object) -> UserError:
    return UserError(
        f"adapter {folder!r}: its {file} cannot be read ({error}); give a folder that PEFT's "
        "`save_pretrained` wrote."
    )


def require_model_folder(name: str, what: str | None = None) -> None:
    """Raise `UserError` if a name is a path without a model's folder; a path is not looked up on
    the hub. The message calls it `what`."""
    folder = Path(name)
    if name in EMBEDDED or (folder / "config.json").is_file() or not looks_like_path(name):
        return
    if checkpoints := sorted(folder.glob("checkpoints/step-*")):
        problem = f"it is the directory of a run; give one of its checkpoints: {checkpoints[-1]}"
    elif folder.is_dir():
        problem = (
            "it is a folder without config.json; give a folder that `save_pretrained` wrote, or a "
            "Hugging Face name"
        )
    else:
        problem = (
            "it is a path, and there is no folder; correct it, or give a Hugging Face name "
            f"(owner/name); the embedded models are {', '.join(EMBEDDED)}"
        )
    raise UserError(f"{what or f'model {name!r}'} cannot be found or read: {problem}.")


# --- weights --------------------------------------------------------------------------------------


def has_weights(folder: Path) -> bool:
    """Return whether a model folder has safetensors: the single file, or all in its index."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return True
    if index.is_file():
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return all((folder / shard).is_file() for shard in set(shards))
    # A shard without its index does not count.
    return any("-of-" not in file.name for file in folder.glob("*.safetensors"))


def require_weights(name: str) -> None:
    """Raise `UserError` for a model folder without weights. A Hugging Face name passes."""
    folder = Path(files_of(name))
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        raise UserError(
            f"model folder {name!r} has no *.safetensors file, and no other weights are read (a "
            "pickle may run code); convert them, where you trust them, with `save_pretrained`."
        )
