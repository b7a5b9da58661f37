"""What belongs together agrees: imports, objectives and their configs, docs, logged metrics."""

import dataclasses
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest

import rlad
from rlad.config.catalogue import CONFIGS
from rlad.config.objective import ObjectiveConfig
from rlad.engines.imitation import FATES
from rlad.objectives import OBJECTIVES, Objective
from rlad.objectives.inputs import LossInputs
from rlad.rollouts.types import Ending
from rlad.runs.directory import EVAL, METRICS, SAMPLES, EvaluationSet, RunDirectory
from rlad.tasks import TASKS
from rlad.teachers import teacher_modules
from tiny_runs import OFTEN_CORRECT, objective_section, run_config, write_unreachable_answers

ROOT = Path(__file__).parents[2]
BY_TEACHERS = {
    "teacher/cache_hits/frac",
    "teacher/privileged/frac",
    "teacher/speaks/frac",
    "teacher/shown_successes/mean",
    "teacher/shortened/frac",
    "teacher/dropped_blocks/frac",
    "teacher/overlap/seconds",
    "teacher/ranking/pairwise",
    "teacher/ranking/auc",
    "objective/teacher_phase/frac",
    "objective/pointwise_clipped/frac",
}
"""Of `cached` and `privileged` teachers, those that work elsewhere, groups with right and wrong
completions, and `opd_then_grpo`; their own tests hold them to these names."""
BY_ROLES = {
    "objective/perception_evidence/mean",
    "objective/perception_weight/mean",
    "objective/reasoning_evidence/mean",
    "objective/reasoning_weight/mean",
}
"""of completions with both roles: test_role_evidence.py"""
BY_VLLM = {
    "sampler/kl/mean",
    "sampler/bounded_weights/frac",
    "time/hand_over/seconds",
    "rollout/staleness/steps",
}
"""with `rollout.engine = "vllm"`; `tests/rollouts/test_vllm_sampler.py` and
`tests/engines/test_staleness.py` look for them"""
BY_EPISODES = {
    "rollout/turns/mean",
    "rollout/turns/max",
    "rollout/environment_tokens/mean",
    *(f"rollout/ended_by_{ending}/frac" for ending in get_args(Ending)),
    "teacher/skills/count",
    "teacher/skill_tries/max",
    "time/skills/seconds",
}
"""of tasks of several turns, and teachers that are shown skills: `tests/engines/test_episodes.py`
holds a batch to these names"""
BATCH = {field.name for field in dataclasses.fields(LossInputs)}
HEAVY = ("torch", "transformers", "trl", "numpy", "matplotlib", "safetensors", "pebble")


@pytest.mark.parametrize(
    "module",
    [
        "rlad",
        "rlad.config.run",
        "rlad.config.file",
        "rlad.cli.main",
        "rlad.config.catalogue",
        "rlad.tasks",
    ],
)
def test_these_import_nothing_heavy(module):
    code = f"import sys, {module}; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_public_names_are_there():
    assert sorted(dir(rlad)) == sorted(rlad.__all__)
    assert all(getattr(rlad, name) is not None for name in rlad.__all__)
    with pytest.raises(AttributeError, match="module 'rlad' has no attribute 'trian'"):
        _ = rlad.trian  # pyright: ignore[reportAttributeAccessIssue]


# --- objectives, tasks, teachers: tables, configs, docs ------------------------------------------


WITHOUT_A_ROW = ("opd_then_grpo",)
"""A config that is no token loss of its own but a schedule of two."""
WHAT_TRAINS = {"sft": {"rejection"}}
"""Knobs of a config that choose rollouts, and are no arguments of its function."""


def test_every_row_of_the_tables_has_a_config():
    assert set(CONFIGS["objectives"]) == {*OBJECTIVES, *WITHOUT_A_ROW}
    assert set(CONFIGS["tasks"]) == set(TASKS)
    assert set(CONFIGS["teachers"]) == set(teacher_modules())


def knobs(row: Objective) -> dict[str, Any]:
    """An objective's own arguments with their defaults: those that are no tensors."""
    functions = (row.function, row.token_advantages, row.divergence)
    parameters = [
        p
        for function in functions
        if function
        for p in inspect.signature(function).parameters.values()
    ]
    return {
        p.name: p.default
        for p in parameters
        if p.default is not p.empty and p.name not in row.takes_too
    }


@pytest.mark.parametrize("name", OBJECTIVES)
def test_config_and_function_have_the_same_knobs_and_defaults(name):
    config: Any = CONFIGS["objectives"][name]()
    given = config.knobs_at(step=0)
    own = {key: given[key] for key in given.keys() - WHAT_TRAINS.get(name, set())}
    assert own == knobs(OBJECTIVES[name])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_tensors_of_the_table_are_those_of_the_function(name):
    parameters = inspect.signature(OBJECTIVES[name].function).parameters.values()
    assert {p.name for p in parameters if p.default is p.empty} == set(OBJECTIVES[name].needs)
    assert {p.name for p in parameters if p.default is None and p.name in BATCH} == set(
        OBJECTIVES[name].takes_too
    )


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_has_a_file_and_a_public_function(name):
    row = OBJECTIVES[name]
    assert (
        row.function.__module__ == f"rlad.objectives.{name}"
        and row.function.__name__ == f"{name}_loss"
    )
    assert getattr(rlad, f"{name}_loss") is row.function


@pytest.mark.parametrize("name", CONFIGS["objectives"])
def test_every_objective_has_a_section_and_a_line_in_the_readme(name):
    page = (ROOT / "docs" / "methods.md").read_text()
    _, heading, section = page.partition(f"\n## `{name}`\n")
    assert heading and section.partition("\n## ")[0].strip(), (
        f"docs/methods.md has no section `{name}`"
    )
    assert re.search(rf"^\| \[?`{name}`", page, flags=re.MULTILINE), (
        f"the table of docs/methods.md has no row `{name}`"
    )
    assert f"`{name}`" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", [*OBJECTIVES, "opd_then_grpo"])
def test_docs_show_the_formula_of_the_file(name):
    doc = inspect.getdoc(importlib.import_module(f"rlad.objectives.{name}")) or ""
    formula = doc.split("\n\n")[1].splitlines()
    assert formula and all("=" in line for line in formula)
    assert name not in OBJECTIVES or OBJECTIVES[name].formula.splitlines() == formula
    shown = (
        [ROOT / "docs" / f"{name}.md"]
        if (ROOT / "docs" / f"{name}.md").is_file()
        else [ROOT / "docs" / "methods.md"]
    )
    for page in [*shown, *([ROOT / "README.md"] if name == "trrd" else [])]:
        assert "\n".join(f"    {line}" for line in formula) in page.read_text(), page


def test_the_union_of_configs_is_the_table():
    assert {config.model_fields["type"].default for config in get_args(ObjectiveConfig)} == {
        *OBJECTIVES,
        *WITHOUT_A_ROW,
    }


# --- metrics -------------------------------------------------------------------------------------


def test_every_logged_metric_is_defined_and_every_definition_is_logged(world, tmp_path):
    page = (ROOT / "docs" / "metrics.md").read_text().replace("`area/quantity/reduction`", "")
    defined = set(re.findall(r"`([a-z_]+(?:/[a-z_0-9]+)+)`", page))
    logged: set[str] = set()
    for name in OBJECTIVES:
        config = run_config(
            world,
            tmp_path / name,
            objective=objective_section(name),
            optimization={"num_steps": 2, "steps_per_rollout_batch": 2, "kl_coef": 0.1},
        )
        logged |= {
            key for row in RunDirectory(rlad.train(config).run_dir).read(METRICS) for key in row
        }
    assert (
        logged - {"step"} - BY_TEACHERS == defined - BY_TEACHERS - BY_VLLM - BY_EPISODES - BY_ROLES
        and "`step`" in page
    )


def test_rows_of_evaluations_are_described(world, tmp_path):
    page = (ROOT / "docs" / "metrics.md").read_text()
    config = run_config(world, tmp_path / "run", optimization={"num_steps": 1})
    config["evaluation"]["ood_task"] = {"test_path": write_unreachable_answers(tmp_path)}
    rows = list(RunDirectory(rlad.train(config).run_dir).read(EVAL))
    assert {row["split"] for row in rows} == set(get_args(EvaluationSet))
    assert [key for key in (*rows[0], *rows[0]["results"][0]) if f"`{key}`" not in page] == []
    assert [name for name in get_args(EvaluationSet) if f"`{name}`" not in page] == []


def test_rows_of_samples_are_described(world, tmp_path):
    page = (ROOT / "docs" / "metrics.md").read_text()
    result = rlad.train(run_config(world, tmp_path / "run", task=OFTEN_CORRECT))
    rows = list(RunDirectory(result.run_dir).read(SAMPLES))
    keys = {key for row in rows for key in row} | {
        key for row in rows for rollout in row["rollouts"] for key in rollout
    }
    records = [
        rollout["imitation"] for row in rows for rollout in row["rollouts"] if rollout["imitation"]
    ]
    assert records and set(records[0]) == {"fates", "advantages", "clamped", "log_ratio_to_teacher"}
    assert [key for key in (*keys, *records[0], *FATES) if f"`{key}`" not in page] == []
