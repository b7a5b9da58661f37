"""Files of problems in every form that is read, and paths that are never asked for on a hub."""

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest

from rlad.errors import UserError
from rlad.tasks.data_files import rows_of

ROWS = [{"prompt": f'What is {i} + {i},\n"exactly"? ½', "answer": str(2 * i)} for i in range(3)]


def lines() -> bytes:
    return "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def table(delimiter: str) -> bytes:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(ROWS[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return file.getvalue().encode("utf-8-sig")


FORMS: dict[str, bytes] = {
    "d.jsonl": lines(),
    "d.JSONL": lines(),
    "d.ndjson": lines(),
    "d.jsonl.gz": gzip.compress(lines()),
    "d.json": json.dumps(ROWS).encode(),
    "lines.json": lines(),
    "d.json.gz": gzip.compress(json.dumps(ROWS).encode()),
    "d.csv": table(","),
    "d.tsv": table("\t"),
    "d.csv.gz": gzip.compress(table(",")),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_holds_the_same_rows(tmp_path, name):
    (tmp_path / name).write_bytes(FORMS[name])
    rows = rows_of(str(tmp_path / name), "train")
    assert list(rows.values()) == ROWS
    assert all(place.startswith(str(tmp_path / name)) for place in rows)


def test_one_object_alone_is_one_row(tmp_path):
    (tmp_path / "d.json").write_text(json.dumps(ROWS[0]))
    assert list(rows_of(str(tmp_path / "d.json"), "train").values()) == ROWS[:1]


@pytest.mark.datasets
def test_parquet_as_a_hub_keeps_it(tmp_path):
    pytest.importorskip("datasets", reason="needs the optional package datasets")
    from pyarrow import Table, parquet

    (tmp_path / "data").mkdir()
    for number, rows in enumerate((ROWS[:2], ROWS[2:])):
        file = tmp_path / "data" / f"train-0000{number}-of-00002.parquet"
        parquet.write_table(Table.from_pylist(rows), file)
    parquet.write_table(Table.from_pylist(ROWS[:1]), tmp_path / "data" / "test-0.parquet")
    assert list(rows_of(str(tmp_path), "train").values()) == ROWS
    assert list(rows_of(str(tmp_path), "test").values()) == ROWS[:1]
    with pytest.raises(UserError, match="none of its files is of the split validation"):
        rows_of(str(tmp_path), "validation")
    (tmp_path / "data" / "train-broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"train-broken.parquet cannot be read"):
        rows_of(str(tmp_path), "train")


def test_files_of_a_folder_are_for_training_where_none_says_otherwise(tmp_path):
    (tmp_path / "a.csv").write_bytes(table(","))
    assert list(rows_of(str(tmp_path), "train").values()) == ROWS


@pytest.mark.parametrize(
    "source, message",
    [
        ("d.xlsx", "is a file; give a file that ends in .jsonl"),
        ("nothing/here/at.all", "looks like a path but does not exist"),
        ("./owner/name", "looks like a path but does not exist"),
        ("folder/d", "looks like a path but does not exist"),
        ("folder", "no .jsonl, .* at all"),
        ("gone.parquet", "cannot be read|needs pyarrow"),
        ("gone.csv", "gone.csv cannot be read .*No such file"),
        ("short.csv", "short.csv, row 2 cannot be read .its number of columns differs"),
        ("cut.jsonl.gz", "cut.jsonl.gz cannot be read"),
        ("half.json", "half.json, line 1 cannot be read"),
    ],
)
def test_what_cannot_be_read_is_said_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, message: str
):
    def asked(*_: Any) -> None:
        raise AssertionError("a path was asked for on a hub")

    monkeypatch.setattr("rlad.tasks.data_files._saved_rows", asked)
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("d.xlsx").write_bytes(b"PK")
    Path("short.csv").write_text("prompt,answer\na,b\nc\n")
    Path("cut.jsonl.gz").write_bytes(gzip.compress(lines())[:40])
    Path("half.json").write_text('[{"prompt": "a", ')
    with pytest.raises(UserError, match=message):
        rows_of(source, "train")
