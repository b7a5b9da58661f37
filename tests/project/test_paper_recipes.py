"""The paper's settings: its stated values, a label behind each value, and the memory table of their
README."""

import re
import runpy
from pathlib import Path

import pytest

from rlad.config.file import load_config
from rlad.config.run import RunConfig
from rlad.export.verl_command import Cluster, require_exportable

PAPER = Path(__file__).parents[2] / "recipes" / "paper"
RECIPES = {path.parent.name: path for path in PAPER.glob("*/run.toml")}
LABELS = ("# paper", "# ours", "# not stated in the paper", "# beta: not stated in the paper")


def recipe(name: str) -> RunConfig:
    return load_config(RECIPES[name])


@pytest.mark.parametrize("name", RECIPES)
def test_it_has_the_values_that_the_paper_states(name):
    config = recipe(name)
    objective, rollout, loop = config.objective, config.rollout, config.optimization
    assert objective.type == "trrd" and (objective.alpha, objective.teacher_log_ratio_clip) == (
        0.5,
        1.0,
    )
    assert (objective.clip_low, objective.clip_high, objective.dual_clip) == (0.2, 0.28, None)
    assert (rollout.prompts_per_batch, rollout.group_size, loop.learning_rate) == (256, 8, 1e-6)
    assert (loop.aggregation, loop.advantage_scale, loop.kl_coef) == ("sequence_mean", "std", 0)


def test_the_settings_are_those_of_their_names():
    student_and_tokens = {
        name: (recipe(name).student.model, recipe(name).rollout.max_completion_tokens)
        for name in RECIPES
    }
    assert student_and_tokens == {
        "kk-qwen3-0.6b-8k": ("Qwen/Qwen3-0.6B", 8192),
        "kk-qwen3-1.7b-2k": ("Qwen/Qwen3-1.7B", 2048),
        "math-8b-base-30k": ("Qwen/Qwen3-8B-Base", 30720),
    }
    for name in ("kk-qwen3-0.6b-8k", "kk-qwen3-1.7b-2k"):
        assert recipe(name).task.model_dump()["num_people"] == tuple(range(2, 9))


@pytest.mark.parametrize("name", RECIPES)
def test_each_value_says_where_it_is_from(name):
    text = RECIPES[name].read_text()
    assert "Not run by us." in text.splitlines()[0]
    values = [line for line in text.splitlines() if re.match(r"\w+ =", line)]
    unlabelled = [
        line
        for line in values
        if not any(label in line for label in LABELS) and not line.startswith("path =")
    ]
    assert len(values) > 20 and unlabelled == []


def test_verl_takes_what_does_not_fit_on_one_device():
    require_exportable(
        recipe("math-8b-base-30k"), Cluster(gpus_per_node=8, teacher_gpus_per_node=8)
    )


def test_the_memory_table_is_what_the_estimate_says(capsys):
    runpy.run_path(str(PAPER / "memory.py"), run_name="__main__")
    table = capsys.readouterr().out
    assert table.count("GiB") == 4 * len(RECIPES) and table in (PAPER / "README.md").read_text()
