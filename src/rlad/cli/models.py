"""`rlad models`: which models are at hand, and preparing one."""

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from rlad.cli.printing import print_line, print_table
from rlad.errors import UserError
from rlad.models.fetch.hub import cached_folder, cached_models, fetch_model
from rlad.models.fetch.wheel import prepare_packaged
from rlad.models.files import EMBEDDED, require_weights
from rlad.models.loading import load_model_config
from rlad.models.packaged import PACKAGED


@dataclass(frozen=True, slots=True)
class ModelRow:
    """A model that a config may name."""

    name: str
    is_ready: bool
    num_bytes: int
    """on the disk; of a packaged one that is not ready what it will take there"""
    about: str


def model_rows() -> list[ModelRow]:
    """Return the embedded and the packaged models, and those in Hugging Face's cache."""
    rows = [
        ModelRow(name, True, _num_bytes(folder), "comes with rlad")
        for name, folder in EMBEDDED.items()
    ]
    for model in PACKAGED.values():
        size = _num_bytes(model.folder) if model.is_ready else model.folder_bytes
        rows.append(ModelRow(model.name, model.is_ready, size, model.summary))
    for name, size in cached_models().items():
        rows.append(ModelRow(name, cached_folder(name) is not None, size, "Hugging Face cache"))
    return rows


def run_models(action: str, name: str | None) -> None:
    """Do what `rlad models` is asked for. Raises `UserError` when the arguments do not fit."""
    console = Console(highlight=False)
    if action == "list" and name is None:
        print_models(console)
    elif action == "prepare" and name is not None:
        prepare(name, console)
    else:
        raise UserError(
            "give `rlad models` alone, or `rlad models prepare NAME` with the name of a model."
        )


def print_models(console: Console) -> None:
    """Print a table of `model_rows`."""
    rows = [("model", "      MB", "state", "")]
    for row in model_rows():
        state = "ready" if row.is_ready else "not prepared"
        rows.append((row.name, f"{row.num_bytes / 1e6:8.0f}", state, row.about))
    print_table(console, rows)
    print_line(
        console,
        "\nA folder or any other Hugging Face name is a model too; `rlad models prepare NAME` "
        "fetches it before a run.",
    )


def prepare(name: str, console: Console) -> Path:
    """Make a model ready for use without a connection; returns its folder.

    Raises `UserError` for what is no model, `RunFailedError` when it cannot be fetched, converted
    or stored.
    """
    packaged = PACKAGED.get(name)
    # From what costs nothing to what must be fetched.
    if name in EMBEDDED:
        folder = EMBEDDED[name]
    elif packaged is not None:
        if not packaged.is_ready:
            print_line(
                console,
                f"fetching {packaged.requirement}, {packaged.wheel_bytes / 1e6:.0f} MB "
                f"({packaged.summary}), and converting it to float32, "
                f"{packaged.folder_bytes / 1e6:.0f} MB in {packaged.folder.parent}",
            )
        folder = prepare_packaged(packaged)
    elif Path(name).is_dir():
        load_model_config(name)
        require_weights(name)
        folder = Path(name)
    else:
        folder = cached_folder(name) or fetch_model(name)
    print_line(console, f"ready  {name}  {_num_bytes(folder) / 1e6:.0f} MB in {folder}")
    return folder


def _num_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
