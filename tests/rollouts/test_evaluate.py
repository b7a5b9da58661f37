"""pass@k by hand and by enumeration, intervals by simulation, and that every model gets the same
prompts."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from rlad.cli.main import main
from rlad.config.run import RolloutConfig
from rlad.models.loading import load_language_model
from rlad.rollouts.evaluation import evaluate
from rlad.runs.rows import ProblemResult, pass_at_1, summarise
from rlad.tasks import make_task
from tiny_runs import FILES, run_config, write_model


def result(
    num_correct: int, *, num_samples: int = 4, key: str = "", difficulty: str = "", **more: Any
) -> ProblemResult:
    given = {
        "index": 0,
        "num_cannot_judge": 0,
        "num_truncated": 0,
        "mean_completion_tokens": 2.0,
        "prompt": "",
        "first_completion": "",
    }
    return ProblemResult(
        num_correct=num_correct,
        num_samples=num_samples,
        key=key,
        difficulty=difficulty,
        **(given | more),
    )


# --- the summary ----------------------------------------------------------------------------------


def test_summary_by_hand():
    results = [
        result(1, key="a", difficulty="2 people", num_truncated=2, mean_completion_tokens=3.0),
        result(3, key="b", difficulty="3 people", num_cannot_judge=1, mean_completion_tokens=5.0),
    ]
    summary = summarise([results])
    assert (summary["num_problems"], summary["num_samples"]) == (2, 4)
    assert summary["mean@4"].mean == 0.5
    assert {k: estimate.mean for k, estimate in summary["pass@k"].items()} == {
        1: 0.5,
        2: 0.75,
        4: 1.0,
    }
    assert {name: e.mean for name, e in summary["pass@1 by difficulty"].items()} == {
        "2 people": 0.25,
        "3 people": 0.75,
    }
    assert summary["mean_completion_tokens"] == 4.0
    assert (summary["truncated_share"], summary["cannot_judge_share"]) == (0.25, 0.125)
    assert pass_at_1(results) == summary["mean@4"]


def test_k_goes_up_to_the_number_of_samples():
    assert list(summarise([[result(1, num_samples=6)]])["pass@k"]) == [1, 2, 4, 6]
    assert list(summarise([[result(1, num_samples=1)]])["pass@k"]) == [1]


def test_no_results():
    with pytest.raises(ValueError, match="evaluate at least one problem"):
        summarise([[]])


# --- evaluating -----------------------------------------------------------------------------------


def evaluated(world: Path, model: Path, **settings: Any) -> list[ProblemResult]:
    task = make_task(**run_config(world, world / "none")["task"])
    rollout = RolloutConfig(max_completion_tokens=4)
    settings = {"num_problems": 2, "num_samples": 3, "temperature": 1.0} | settings
    return evaluate(load_language_model(str(model)), task, "test", rollout=rollout, **settings)


def test_every_model_gets_the_same_prompts_and_an_equal_one_the_same_completions(world, tmp_path):
    student = evaluated(world, world / "student")
    teacher = evaluated(world, world / "teacher")
    assert [(r.index, r.key, r.prompt) for r in student] == [
        (r.index, r.key, r.prompt) for r in teacher
    ]
    assert {r.prompt for r in student} == {problem["prompt"] for problem in FILES["test_path"]}
    assert [r.first_completion for r in student] != [r.first_completion for r in teacher]
    assert student == evaluated(world, write_model(tmp_path / "again", seed=1))


def test_more_problems_than_there_are(world):
    assert len(evaluated(world, world / "student", num_problems=50)) == 2


def test_temperature_0_gives_every_sample_the_same_completion(world):
    assert all(
        r.num_correct in (0, 3) for r in evaluated(world, world / "student", temperature=0.0)
    )


def test_evaluate_command(world, tmp_path):
    """Of a model, with JSON and a file of results that agree."""
    config = run_config(world, tmp_path / "run")
    output = tmp_path / "results.jsonl"
    settings = [f"task.{key}={value}" for key, value in config["task"].items() if key != "type"]
    command = [
        "evaluate",
        str(world / "student"),
        "--task",
        "jsonl",
        "--num-samples",
        "4",
        "--output",
        str(output),
        "--json",
    ]
    done = CliRunner().invoke(main, [*command, *settings, "rollout.max_completion_tokens=4"])
    assert done.exit_code == 0, done.output
    summary = json.loads(done.stdout)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert (summary["model"], summary["task"], summary["split"]) == (
        str(world / "student"),
        "jsonl",
        "test",
    )
    assert summary["mean@4"]["mean"] == sum(row["num_correct"] for row in rows) / 8
    assert list(summary["pass@k"]) == ["1", "2", "4"]
