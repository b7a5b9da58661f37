"""Paths of a config file start at its folder, and what a run does otherwise than it may seem is
said."""

from pathlib import Path

import pytest

from rlad.config.catalogue import names
from rlad.config.comparison import load_comparison, method_config
from rlad.config.file import load_config, parse_config
from rlad.config.run import RunConfig
from rlad.errors import UserError
from rlad.tasks.logic import KnightsAndKnaves
from rlad.training.notes import notes_on

RUN = """
[student]
model = "student"
[objective]
type = "grpo"
[task]
type = "jsonl"
path = "rows.jsonl"
test_path = "elsewhere.jsonl"
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    inside = tmp_path / "here" / "configs"
    (inside / "student").mkdir(parents=True)
    (inside / "rows.jsonl").write_text("")
    (inside / "run.toml").write_text(RUN)
    (inside / "compare.toml").write_text('run = "run.toml"\n[methods.grpo]\n')
    monkeypatch.chdir(tmp_path / "here")
    return inside


def test_what_is_beside_a_file_is_found_from_every_folder(folder, monkeypatch):
    config = load_config("configs/run.toml")
    assert (config.student.model, config.task.path) == ("configs/student", "configs/rows.jsonl")
    assert config.task.test_path == "elsewhere.jsonl"  # which is nowhere: as it is written
    assert load_config("configs/run.toml", ["task.path=rows.jsonl"]).task.path == "rows.jsonl"
    comparison, place = load_comparison("configs/compare.toml")
    assert method_config(comparison, place, "grpo", seed=0).task.path == "configs/rows.jsonl"
    monkeypatch.chdir(folder)
    assert load_config("run.toml").task.path == "rows.jsonl"
    # The config of a run directory has the paths of where the run was started.
    (folder / "config.toml").write_text(RUN)
    monkeypatch.chdir(folder.parent)
    assert load_config("configs").task.path == "rows.jsonl"


def test_the_config_of_a_run_is_no_comparison(folder):
    with pytest.raises(UserError, match="is the config of a run, and a comparison has a file of"):
        load_comparison(folder / "run.toml")


def test_every_section_and_setting_of_a_run_is_listed():
    assert names("settings").keys() == RunConfig.model_fields.keys()


def test_what_is_taken_otherwise_is_said():
    evaluation = {"num_validation_problems": 400}
    table = {"student": {"model": "embedded/student"}, "task": {"type": "knights_and_knaves"}}
    config = parse_config({**table, "objective": {"type": "grpo"}, "evaluation": evaluation})

    class Small(KnightsAndKnaves):
        def num_problems(self, split):
            return {"train": 500, "validation": 12, "test": 300}[split]

    few, instructed = notes_on(config, Small())
    assert "num_validation_problems = 400, but there are 12: all" in few
    assert "set task.instructions = false" in instructed
    plain = config.task.model_copy(update={"instructions": False})
    assert not list(notes_on(config.model_copy(update={"task": plain}), KnightsAndKnaves()))
