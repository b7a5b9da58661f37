"""EleutherAI's lm-eval on an exported model: its figure is that of `rlad evaluate`, problem by
problem."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import rlad
from rlad.cli.evaluate import evaluate_run_or_model
from rlad.export.model import export_model
from rlad.runs.directory import RunDirectory
from tiny_runs import OFTEN_CORRECT, PROBLEMS, run_config, write_world

RECIPE = Path(__file__).parents[2] / "recipes" / "lm_eval"


@pytest.mark.lm_eval
@pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="the optional package lm-eval is not installed",
)
def test_its_figure_is_that_of_rlad_evaluate(tmp_path):
    """Six sums that a student has not seen, of which it answers some right."""
    world = write_world(tmp_path)
    for name, problems in {
        "path": PROBLEMS[:2],
        "validation_path": PROBLEMS[2:3],
        "test_path": PROBLEMS[3:],
    }.items():
        (world / f"{name}.jsonl").write_text(
            "".join(json.dumps(problem) + "\n" for problem in problems)
        )
    sections = {
        "rollout": {"prompts_per_batch": 2, "group_size": 8},
        "objective": {"type": "grpo"},
        "task": OFTEN_CORRECT,
    }
    evaluation, loop = (
        {"num_test_problems": 6, "every_steps": 20},
        {"num_steps": 20, "learning_rate": 1e-2},
    )
    run_dir = rlad.train(
        run_config(world, tmp_path / "run", evaluation=evaluation, optimization=loop, **sections)
    ).run_dir
    _, checkpoint = RunDirectory(run_dir).newest_checkpoint()
    _, ours = evaluate_run_or_model(
        str(checkpoint), ["evaluation.temperature=0.0"], None, "test", 6, 1, None
    )
    folder = export_model(str(run_dir), checkpoint="last")
    command = [
        sys.executable,
        "-m",
        "lm_eval",
        "--model",
        "hf",
        "--device",
        "cpu",
        "--batch_size",
        "6",
        "--log_samples",
    ]
    command += [
        "--model_args",
        f"pretrained={folder},dtype=float32",
        "--include_path",
        str(RECIPE),
        "--tasks",
        "rlad_run",
    ]
    command += ["--gen_kwargs", "max_gen_toks=4", "--output_path", str(tmp_path / "lm-eval")]
    environment = os.environ | {
        "RLAD_RUN": str(run_dir),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
        "HF_HOME": str(tmp_path / "cache"),
    }
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    [samples] = (tmp_path / "lm-eval").rglob("samples_rlad_run_*.jsonl")
    theirs = {row["doc"]["index"]: row for row in map(json.loads, samples.read_text().splitlines())}
    assert [theirs[result.index]["exact_match"] for result in ours] == [
        float(result.num_correct) for result in ours
    ]
    assert [theirs[result.index]["filtered_resps"][0].strip() for result in ours] == [
        r.first_completion.strip() for r in ours
    ]
    [summary] = (tmp_path / "lm-eval").rglob("results_*.json")
    figure = json.loads(summary.read_text())["results"]["rlad_run"]["exact_match,none"]
    assert (
        figure == pytest.approx(sum(result.num_correct for result in ours) / 6) and 0 < figure < 1
    )
