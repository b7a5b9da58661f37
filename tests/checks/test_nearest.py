"""`rlad check --nearest`: how much student and teacher solve, and what helped where others solved
about as much."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from rlad.checks.nearest import MeasuredCase, describe_nearest, measured_cases, nearest
from rlad.checks.pass_rates import NUM_SAMPLES, check_pass_rates, measure_pass_rates
from rlad.cli.main import main
from rlad.config.file import parse_config
from rlad.models.loading import load_language_model
from rlad.rollouts.evaluation import evaluate
from rlad.runs.statistics import Estimate
from rlad.tasks import make_task
from tiny_runs import run_config, write_config


def case(name: str, student: float, teacher: float) -> MeasuredCase:
    return MeasuredCase(name, student, teacher, {"opd": Estimate(0.1, 0.05, 0.15)}, 3)


def test_the_nearest_by_hand() -> None:
    """From (.3, .8): a is .1 away, b .5, c the root of .02, which is .141."""
    cases = [case("b", 0.3, 0.3), case("c", 0.4, 0.9), case("a", 0.3, 0.9)]
    assert [one.name for one in nearest(0.3, 0.8, cases, number=2)] == ["a", "c"]


def test_what_a_case_says() -> None:
    estimates = {"trrd": Estimate(0.035, 0.007, 0.069), "opd": Estimate(0.11, 0.058, 0.167)}
    message = MeasuredCase("Sokoban", 0.388, 0.923, estimates, 3).message
    assert message == (
        "Sokoban (student 39%, teacher 92%, 3 seeds), points above grpo: opd +11.0 [+5.8, +16.7], "
        "trrd +3.5 [+0.7, +6.9]"
    )


def test_the_cases_of_the_package() -> None:
    by_name = {one.name: one for one in measured_cases()}
    assert by_name["puzzles"].num_seeds == 5
    assert by_name["puzzles"].to_grpo["trrd"].mean == pytest.approx(0.059, abs=5e-4)
    found = describe_nearest(Estimate(0.25, 0.2, 0.3), Estimate(0.96, 0.9, 1.0))
    assert [one.subject for one in found] == ["nearest case"] * 3 + ["how far it carries"]
    assert found[0].message.startswith("puzzles") and "rlad compare" in found[-1].message


def test_a_teacher_without_lead_is_a_warning() -> None:
    found = describe_nearest(Estimate(0.3, 0.2, 0.4), Estimate(0.31, 0.2, 0.4))
    (warning,) = [one for one in found if one.level == "warning"]
    assert "31%" in warning.message and "30%" in warning.message


def test_pass_rates_are_those_of_an_evaluation(world: Path) -> None:
    config = parse_config(run_config(world, Path("unused")))
    rates = measure_pass_rates(config, 2)
    task = make_task(**config.task.model_dump())
    for name, found in (("student", rates.student), ("teacher", rates.teacher)):
        results = evaluate(
            load_language_model(str(world / name)),
            task,
            "validation",
            rollout=config.rollout,
            num_problems=2,
            num_samples=NUM_SAMPLES,
            temperature=config.evaluation.temperature,
        )
        assert found.mean == sum(one.num_correct for one in results) / (2 * NUM_SAMPLES)


def test_what_the_command_says(world: Path, tmp_path: Path) -> None:
    path = write_config(tmp_path / "run.toml", run_config(world, tmp_path / "run"))
    result = CliRunner().invoke(main, ["check", str(path), "--nearest", "2", "--json"])
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert report["pass_rates"]["num_problems"] == 2
    subjects = [one["subject"] for one in report["findings"]]
    assert subjects.count("nearest case") == 3 and "pass@1" in subjects


def test_without_a_teacher_that_writes_it_says_so_and_the_run_can_be_trained(world: Path) -> None:
    config = run_config(world, Path("unused")) | {"teacher": {"type": "ema"}}
    rates, (warning,) = check_pass_rates(parse_config(config), 2)
    assert rates is None and warning.level == "warning" and "is 'ema'" in warning.message
    config = run_config(world, Path("unused"), objective={"type": "grpo"})
    del config["teacher"]
    _, (warning,) = check_pass_rates(parse_config(config), 2)
    assert warning.message.endswith("there is none")
