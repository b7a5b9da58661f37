"""A run is resumed on the files with which it began, and on no others."""

import json
from pathlib import Path

import pytest

from rlad.config.file import parse_config
from rlad.config.run import RunConfig
from rlad.errors import UserError
from rlad.runs.directory import ENVIRONMENT, RunDirectory
from rlad.training.named_files import fingerprints, require_same_files

ROWS = ['{"prompt": "1 + 1?", "answer": "2"}\n', '{"prompt": "1 + 2?", "answer": "3"}\n']


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "rows.jsonl").write_text("".join(ROWS))
    (tmp_path / "judges_of_mine.py").write_text("def judge(completion, answer):\n    return 1.0\n")
    for folder in ("student", "teacher"):
        (tmp_path / folder / ".cache").mkdir(parents=True)
        (tmp_path / folder / "config.json").write_text("{}")
    return parse_config(
        {
            "student": {"model": "student"},
            "teacher": {"type": "cached", "teacher": {"type": "local", "model": "teacher"}},
            "task": {"type": "jsonl", "path": "rows.jsonl", "verifier": "judges_of_mine:judge"},
        }
    )


def begun(config: RunConfig, folder: Path) -> RunDirectory:
    folder.mkdir()
    (folder / ENVIRONMENT).write_text(json.dumps({"files": fingerprints(config)}))
    return RunDirectory(folder)


def test_what_is_loaded_again_is_hashed(config):
    assert fingerprints(config).keys() == {"teacher.teacher.model", "task.path", "task.verifier"}
    leash = config.optimization.model_copy(update={"kl_coef": 0.1})
    tied = config.model_copy(update={"optimization": leash})
    assert "student.model" in fingerprints(tied)


@pytest.mark.parametrize(
    "file, content, setting",
    [
        ("rows.jsonl", "".join(ROWS[::-1]), "task.path = 'rows.jsonl'"),
        ("rows.jsonl", "".join(ROWS).replace("3", "4"), "task.path = 'rows.jsonl'"),
        ("judges_of_mine.py", "def judge(*_):\n    return 0.0\n", "task.verifier"),
        ("teacher/config.json", '{"a": 1}', "teacher.teacher.model = 'teacher'"),
        ("teacher/more.json", "{}", "teacher.teacher.model = 'teacher'"),
    ],
)
def test_a_file_that_has_changed_is_named(config, tmp_path, file, content, setting):
    run = begun(config, tmp_path / "run")
    require_same_files(run, config)
    (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=f"{setting}.* has changed since the run") as raised:
        require_same_files(run, config)
    assert "put the former content back" in str(raised.value)


def test_what_does_not_count_may_change(config, tmp_path):
    run = begun(config, tmp_path / "run")
    (tmp_path / "student" / "config.json").write_text('{"a": 1}')  # the checkpoint holds it
    (tmp_path / "teacher" / ".cache" / "x").write_text("x")
    (tmp_path / "rows.jsonl").rename(tmp_path / "moved.jsonl")
    require_same_files(run, config)
    moved = config.task.model_copy(update={"path": "moved.jsonl"})
    require_same_files(run, config.model_copy(update={"task": moved}))
    (run.path / ENVIRONMENT).write_text("{}")  # of a run that was begun by an earlier version
    require_same_files(run, config)


def test_of_a_large_file_size_and_blocks_count(config, tmp_path):
    large = tmp_path / "teacher" / "model.safetensors"
    with large.open("wb") as file:
        file.truncate(2**26 + 2**20)
    before = fingerprints(config)
    with large.open("r+b") as file:
        file.seek(2**26)
        file.write(b"x")
    assert fingerprints(config) != before
