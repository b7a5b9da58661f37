"""Models on the Hugging Face hub: which of them lie in its cache, and fetching one."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlad.errors import RunFailedError, UserError
from rlad.models.files import has_weights

_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.txt", "*.model"]
"""weights, config and tokenizer; no pickles, and no weights in other formats"""
_SPARE = ["*/*"]
"""folders beside the model: checkpoints, other formats"""


@dataclass(frozen=True, slots=True)
class CachedModel:
    name: str
    num_bytes: int
    is_ready: bool
    """whether config and all weights are there"""


@dataclass(frozen=True, slots=True)
class Fetch:
    """What fetching a model means: how many files are still missing and how large they are."""

    name: str
    num_files: int
    num_bytes: int


def cached_models() -> list[CachedModel]:
    """The language models in Hugging Face's cache, by name."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = scan_cache_dir().repos
    except CacheNotFound:
        return []
    models = [
        CachedModel(repo.repo_id, repo.size_on_disk, cached_folder(repo.repo_id) is not None)
        for repo in repos
        if repo.repo_type == "model"
        and any(file.file_name == "config.json" for r in repo.revisions for file in r.files)
    ]
    return sorted(models, key=lambda model: model.name)


def cached_folder(name: str) -> Path | None:
    """Where a model lies in the cache with its config and all of its weights; None when it does
    not."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(
            snapshot_download(
                name, local_files_only=True, allow_patterns=_FILES, ignore_patterns=_SPARE
            )
        )
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    return folder if (folder / "config.json").is_file() and has_weights(folder) else None


def plan_fetch(name: str) -> Fetch:
    """What of a model is missing in the cache. Asks the hub; raises as `fetch_model`, and
    `UserError` without safetensors."""
    files = _from_hub(name, dry_run=True)
    if not any(file.filename.endswith(".safetensors") for file in files):
        raise UserError(
            f"model {name!r} has no *.safetensors file on the Hugging Face hub, and no other "
            "weights are read (a pickle may "
            "run code); take another model, or convert it where you trust it with "
            "`save_pretrained` and give that folder."
        )
    missing = [file for file in files if file.will_download]
    return Fetch(name, len(missing), sum(file.file_size or 0 for file in missing))


def fetch_model(name: str) -> Path:
    """The folder of a model, fetched into the cache with a progress bar.

    Raises `UserError` when the hub has no such model or does not hand it out, `RunFailedError`
    without a connection.
    """
    return Path(_from_hub(name, dry_run=False))


def _from_hub(name: str, *, dry_run: bool) -> Any:
    """huggingface_hub's list of files when nothing is to be fetched, else the path of the
    folder."""
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "0"
    import httpx2
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return snapshot_download(
            name, allow_patterns=_FILES, ignore_patterns=_SPARE, dry_run=dry_run
        )
    except HFValidationError:
        raise _unknown(name) from None
    except (HfHubHTTPError, httpx2.HTTPError, LocalEntryNotFoundError, OSError) as error:
        cause = error.__cause__ or error
        if isinstance(cause, RepositoryNotFoundError):
            raise _unknown(name) from None
        reason = (str(cause).strip().splitlines() or [type(cause).__name__])[0].rstrip(".")
        raise RunFailedError(
            f"model {name!r} is not complete in the Hugging Face cache and cannot be fetched "
            f"({reason}); is there a "
            "connection, and is HF_HUB_OFFLINE unset?"
        ) from None


def _unknown(name: str) -> ValueError:
    return ValueError(
        f"there is no model {name!r}: no folder of that name, and the Hugging Face hub has none, "
        "or none for you; check the "
        "name, or log in with `hf auth login`."
    )
