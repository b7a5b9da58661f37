"""Models on the Hugging Face hub: find one in the cache, or fetch it."""

import os
from pathlib import Path
from typing import Any

from rlad.errors import RunFailedError, UserError
from rlad.models.files import has_weights
from rlad.text import first_line

# Weights, config and tokenizer; no pickles, no weights in other formats, and no folders beside the
# model.
_FILES: dict[str, Any] = {
    "allow_patterns": [
        "*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.txt", "*.model"
    ],
    "ignore_patterns": ["*/*"],
}  # fmt: skip


def cached_folder(name: str) -> Path | None:
    """Return the folder of a model in the cache, if its config and all weights are there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, local_files_only=True, **_FILES))
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    return folder if (folder / "config.json").is_file() and has_weights(folder) else None


def fetch_model(name: str) -> Path:
    """Fetch a model into the cache with huggingface_hub's progress bars; return its folder.

    Raises `UserError` if the hub has no such model, refuses access or has no safetensors of it, and
    `RunFailedError` without a connection.
    """
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "0"
    import httpx2
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    problem = (
        "has no config.json with *.safetensors there, and no other weights are read (a pickle may "
        "run code); take another model, or convert it where you trust it with `save_pretrained`"
    )
    try:
        files: Any = snapshot_download(name, dry_run=True, **_FILES)
        if any(file.filename.endswith(".safetensors") for file in files):
            snapshot_download(name, **_FILES)
    except (HFValidationError, httpx2.HTTPError, OSError) as error:
        cause = error.__cause__ or error
        if not isinstance(cause, HFValidationError | RepositoryNotFoundError):
            raise RunFailedError(
                f"model {name!r} is not complete in the Hugging Face cache and cannot be fetched "
                f"({first_line(cause).rstrip('.')}); is there a connection, and is HF_HUB_OFFLINE "
                "unset?"
            ) from None
        problem = "does not exist there, or not for you; check it, or log in with `hf auth login`"
    folder = cached_folder(name)
    if folder is None:
        raise UserError(f"model {name!r} of the Hugging Face hub {problem}.")
    return folder
