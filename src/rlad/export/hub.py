"""An exported model and its card, pushed to the Hugging Face hub."""

import shutil
from pathlib import Path

from rlad.errors import RunFailedError, UserError
from rlad.runs.curve import CURVE
from rlad.runs.directory import CONFIG, MODEL_CARD, RunDirectory
from rlad.text import first_line


def require_push(repo: str) -> None:
    """Raise `UserError` for an invalid repository name, and if nobody is logged in."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
        is_whole = repo.count("/") == 1
    except HFValidationError:
        is_whole = False
    if not is_whole:
        raise UserError(
            f"--push {repo!r} is not a repository name; give one of the form USER/NAME, such as "
            "ada/my-model."
        )
    if not get_token():
        raise UserError(
            "--push needs a login at the hub; run `hf auth login`, or set HF_TOKEN to a token that "
            "may write."
        )


def push_model(run: RunDirectory, folder: Path, repo: str, *, private: bool) -> str:
    """Push an exported model with card, curve and config of its run; returns the address.

    Raises `RunFailedError` if the hub does not accept it; the folder is not changed.
    """
    import httpx2
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    _add_card(run, folder, repo)
    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Model of an rlad run")
    except (HfHubHTTPError, httpx2.HTTPError, OfflineModeIsEnabled, OSError) as error:
        raise RunFailedError(
            f"{folder} is written, but the hub does not take it as {repo} "
            f"({first_line(error).rstrip('.')}); push it again with `hf upload {repo} {folder}`."
        ) from None
    return f"{api.endpoint}/{repo}"


def _add_card(run: RunDirectory, folder: Path, repo: str) -> None:
    """Add the run's card to the model's folder, with the repository's name for loading."""
    card = (run.path / MODEL_CARD).read_text(encoding="utf-8") if run.is_finished() else ""
    lines = [
        f'folder = "{repo}"' if line.startswith("folder = ") else line for line in card.splitlines()
    ]
    (folder / MODEL_CARD).write_text("\n".join([*lines, ""]), encoding="utf-8")
    for name in (CURVE, CONFIG):
        if (run.path / name).is_file():
            shutil.copyfile(run.path / name, folder / name)
