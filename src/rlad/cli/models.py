"""`rlad models`: list the available models, and prepare one."""

from pathlib import Path

from rich.console import Console

from rlad.cli.printing import print_line, print_table
from rlad.models.fetch.hub import cached_folder, fetch_model
from rlad.models.fetch.wheel import prepare_packaged
from rlad.models.files import EMBEDDED, require_weights
from rlad.models.packaged import PACKAGED
from rlad.models.without_weights import load_model_config


def print_models() -> None:
    """Print the embedded and the packaged models with their sizes on the disk, or their expected
    sizes if they are not prepared."""
    console = Console(highlight=False)
    rows = [("model", "      MB", "state", "")]
    for name, folder in EMBEDDED.items():
        rows.append((name, f"{_megabytes(folder):8.0f}", "ready", "comes with rlad"))
    for model in PACKAGED.values():
        size = _megabytes(model.folder) if model.is_ready else model.folder_bytes / 1e6
        state = "ready" if model.is_ready else "not prepared"
        rows.append((model.name, f"{size:8.0f}", state, model.summary))
    print_table(console, rows)
    print_line(
        console,
        "\nA model may also be a folder or a Hugging Face name; `rlad models prepare NAME` "
        "downloads it before a run, `hf cache ls` lists what is there.",
    )


def prepare(name: str) -> Path:
    """Prepare a model for use without a connection, and return its folder.

    Raises `UserError` if there is no such model, `RunFailedError` if it cannot be downloaded,
    converted or stored.
    """
    if name in EMBEDDED:
        folder = EMBEDDED[name]
    elif name in PACKAGED:
        folder = prepare_packaged(PACKAGED[name])
    elif Path(name).is_dir():
        load_model_config(name)
        require_weights(name)
        folder = Path(name)
    else:
        folder = cached_folder(name) or fetch_model(name)
    print_line(Console(highlight=False), f"ready  {name}  {_megabytes(folder):.0f} MB in {folder}")
    return folder


def _megabytes(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
