"""Rows of problems: a file, a folder of files, or a data set of the package `datasets`."""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rlad.errors import UserError, require_package
from rlad.text import looks_like_path

_LINES = (".jsonl", ".ndjson")
_TABLES = {".csv": ",", ".tsv": "\t"}
SUFFIXES = (*_LINES, ".json", *_TABLES, ".parquet")
_NAMES_OF_SPLITS = {
    "train": ("train",),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}
# Files in folders that `datasets` saved by `save_to_disk`.
_SAVED = ("state.json", "dataset_dict.json")
_UNREADABLE = (OSError, EOFError, ValueError, csv.Error, zlib.error, RecursionError)


def rows_of(source: str, split: str) -> dict[str, Any]:
    """Read the rows of a file, a folder or a data set on the hub, by their locations.

    A source that looks like a path is never requested from the hub. Raises `UserError` if the
    source cannot be read.
    """
    path = Path(source)
    if path.is_dir():
        if any((path / name).is_file() for name in _SAVED):
            return _saved_rows(source, split)
        return _rows_of_folder(path, split)
    if path.is_file() or looks_like_path(source) or _suffix(path) in SUFFIXES:
        return _rows_of_file(path)
    return _saved_rows(source, split)


def _suffix(path: Path) -> str:
    """Return the suffix of a file's name, without `.gz`."""
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix


def _rows_of_file(path: Path) -> dict[str, Any]:
    suffix = _suffix(path)
    if suffix not in SUFFIXES:
        what = "is a file" if path.is_file() else "looks like a path but does not exist"
        raise UserError(
            f"{path} {what}; give a file that ends in {', '.join(SUFFIXES)} (or .gz after it), a "
            "folder of such files, or a name on the Hugging Face hub such as openai/gsm8k:main."
        )
    if suffix == ".parquet":
        require_package("pyarrow", f"{path}: a parquet file", extra="datasets")
    read = _READERS.get(suffix, _table)
    where = [str(path)]
    try:
        return dict(read(path, where))
    except _UNREADABLE as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{where[0]} cannot be read ({error}); give the path of a .jsonl file with one JSON "
            f"object in UTF-8 a line, or of {', '.join(SUFFIXES[2:])}."
        ) from error


def _lines(path: Path, where: list[str]) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(_content(path).split(b"\n"), start=1):
        where[0] = f"{path}, line {number}"
        if line.strip():
            yield where[0], json.loads(line)


def _json(path: Path, where: list[str]) -> Iterator[tuple[str, Any]]:
    """Read a list of objects, or JSON Lines in a file with this suffix."""
    try:
        rows = json.loads(_content(path))
    except json.JSONDecodeError:
        yield from _lines(path, where)
        return
    for number, row in enumerate(rows if isinstance(rows, list) else [rows], start=1):
        yield f"{path}, row {number}", row


def _table(path: Path, where: list[str]) -> Iterator[tuple[str, Any]]:
    text = io.StringIO(_content(path).decode("utf-8-sig"), newline="")
    for number, row in enumerate(csv.DictReader(text, delimiter=_TABLES[_suffix(path)]), start=1):
        where[0] = f"{path}, row {number}"
        if None in row or None in row.values():
            raise ValueError("its number of columns differs from that of the first line")
        yield where[0], row


def _parquet(path: Path, where: list[str]) -> Iterator[tuple[str, Any]]:
    from pyarrow import ArrowException, parquet

    try:
        rows = parquet.read_table(path).to_pylist()
    except ArrowException as error:
        raise ValueError(str(error)) from None
    for number, row in enumerate(rows, start=1):
        yield f"{path}, row {number}", row


_READERS: dict[str, Callable[[Path, list[str]], Iterator[tuple[str, Any]]]] = {
    **dict.fromkeys(_LINES, _lines),
    ".json": _json,
    ".parquet": _parquet,
}


def _content(path: Path) -> bytes:
    content = path.read_bytes()
    return gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content


def _rows_of_folder(folder: Path, split: str) -> dict[str, Any]:
    """Read the files of a folder whose names begin with this split, such as
    `data/train-00000-of-00001.parquet`. If no file is named by split, all are for training."""
    files = [file for file in sorted(folder.rglob("*")) if _suffix(file) in SUFFIXES]
    of_split = {
        name: [file for file in files if file.name.lower().startswith(words)]
        for name, words in _NAMES_OF_SPLITS.items()
    }
    if not any(of_split.values()):
        of_split["train"] = files
    if not of_split[split]:
        there = ", ".join(file.name for file in files[:3]) or f"no {', '.join(SUFFIXES)} at all"
        raise UserError(
            f"{folder}: none of its files is of the split {split} ({there}); add a file whose name "
            f"begins with {_NAMES_OF_SPLITS[split][0]}."
        )
    rows: dict[str, Any] = {}
    for file in of_split[split]:
        rows |= _rows_of_file(file)
    return rows


def _saved_rows(source: str, split: str) -> dict[str, Any]:
    """Read a folder of `save_to_disk` or a name on the hub with the package `datasets`."""
    require_package("datasets", f"{source} is no file here, and a data set of that name")
    import datasets

    try:
        if Path(source).is_dir():
            data: Any = datasets.load_from_disk(source)
            data = data[split] if isinstance(data, dict) else data
        else:
            name, _, subset = source.partition(":")
            data = datasets.load_dataset(name, subset or None, split=split)
    except Exception as error:  # the package raises many kinds of errors
        raise UserError(
            f"{source}: datasets cannot load its split {split} ({type(error).__name__}: {error}); "
            "give a .jsonl file, a folder made by save_to_disk, or a name on the Hugging Face hub, "
            "with that split."
        ) from error
    return {f"{source}, row {number}": row for number, row in enumerate(data, start=1)}
