"""`rlad doctor`: run directories made sick, one for each diagnosis, which is found and no other; a
healthy one is silent."""

import fcntl
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from test_guards import concerned, rows_of

import rlad
from rlad.cli.main import main
from rlad.config.file import dump_config, load_config
from rlad.runs.directory import RunDirectory
from rlad.runs.doctor import diagnose
from rlad.runs.guards import GUARDS, Watch
from tiny_runs import rlad_fails, run_config

NUM_STEPS = 30
SECONDS = {"time/generation/seconds": 5.0, "time/teacher/seconds": 2.0, "time/update/seconds": 3.0}
HEALTHY = SECONDS | {
    "reward/mean": 0.4,
    "reward/zero_variance/frac": 0.3,
    "reward/cannot_judge/frac": 0.0,
    "rollout/completion_tokens/mean": 50.0,
    "rollout/truncated/frac": 0.05,
    "rollout/repeated/frac": 0.1,
    "objective/dropped_tokens/count": 0.0,
    "objective/trained_tokens/count": 1e6,
    "objective/gated_positive/frac": 0.02,
    "objective/gated_negative/frac": 0.03,
    "objective/ratio/max": 1.6,
    "teacher/log_ratio/q50": 0.01,
    "student/entropy/mean": 0.4,
    "sampler/mismatch/mean": 1e-7,
    "optimization/gradient_norm": 0.2,
    "optimization/skipped/count": 0.0,
}


@pytest.fixture(scope="module")
def finished(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with models and checkpoints that are whole; the figures of its files take the place of
    its own in `sick`."""
    path = tmp_path_factory.mktemp("finished") / "run"
    rlad.train(run_config(world, path, optimization={"num_steps": 2}))
    return path


@pytest.fixture
def healthy(finished: Path, tmp_path: Path) -> Path:
    """A finished run of 30 steps that learned, with the checkpoints of a short one."""
    path = tmp_path / "run"
    config = load_config(finished)
    loop = config.optimization.model_copy(update={"num_steps": NUM_STEPS})
    path.mkdir()
    for name in ("run.json", "README.md", "samples.jsonl"):
        (path / name).write_bytes((finished / name).read_bytes())
    (path / "checkpoints").symlink_to(finished / "checkpoints")
    (path / "config.toml").write_text(
        dump_config(config.model_copy(update={"optimization": loop, "run_dir": str(path)}))
    )
    write_rows(
        path, "metrics.jsonl", [{"step": step} | HEALTHY for step in range(1, NUM_STEPS + 1)]
    )
    write_validations(path, 0.3, 0.5, 0.6, 0.65)
    return path


def write_rows(path: Path, name: str, rows: list[dict[str, Any]]) -> None:
    (path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


RESULT = {
    "index": 0,
    "key": "key",
    "difficulty": "",
    "num_samples": 4,
    "num_correct": 1,
    "num_cannot_judge": 0,
    "num_truncated": 0,
    "mean_completion_tokens": 10.0,
    "prompt": "",
    "first_completion": "",
}


def write_validations(path: Path, *means: float) -> None:
    """pass@1 every ten steps, with intervals of 0.1 to both sides."""
    rows = [
        {
            "step": 10 * i,
            "split": "validation",
            "pass@1": {"mean": mean, "low": mean - 0.1, "high": mean + 0.1},
            "results": [RESULT],
        }
        for i, mean in enumerate(means)
    ]
    write_rows(path, "eval.jsonl", rows)


def change_rows(path: Path, change: Callable[[list[dict[str, Any]]], Any]) -> None:
    rows = list(RunDirectory(path).read("metrics.jsonl"))
    change(rows)
    write_rows(path, "metrics.jsonl", rows)


def found(path: Path) -> list[tuple[str, str]]:
    return [(each.level, each.name) for each in diagnose(path).found]


def own_checkpoints(path: Path) -> Path:
    """A copy of the checkpoints, to be damaged; returns the newest."""
    shared = (path / "checkpoints").resolve()
    (path / "checkpoints").unlink()
    for file in (each for each in shared.rglob("*") if each.is_file()):
        target = path / "checkpoints" / file.relative_to(shared)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    return RunDirectory(path).checkpoints()[-1][1]


# --- healthy --------------------------------------------------------------------------------------


def test_a_healthy_run_is_silent(healthy):
    assert diagnose(healthy).found == []
    result = CliRunner().invoke(main, ["doctor", str(healthy)])
    assert (result.exit_code, result.stdout) == (
        0,
        f"{healthy}: step 30 of 30, finished\nnothing is wrong with it\n",
    )


def test_a_run_in_a_folder_that_holds_none():
    assert "there is no run in nowhere; give the directory of a run" in rlad_fails(
        "doctor", "nowhere"
    )


def test_it_changes_nothing(healthy):
    before = {path: path.read_bytes() for path in healthy.rglob("*") if path.is_file()}
    diagnose(healthy)
    assert {path: path.read_bytes() for path in healthy.rglob("*") if path.is_file()} == before


# --- guards ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("guard", GUARDS, ids=lambda guard: guard.name)
def test_every_guard_is_a_diagnosis(healthy, guard):
    config = load_config(healthy)
    run = concerned(guard)
    student = config.student.model_copy(update={"dtype": run.student.dtype})
    changed = config.model_copy(update={"student": student, "objective": run.objective})
    (healthy / "config.toml").write_text(dump_config(changed))
    figure = (guard.condition.limit or 1e-9) * (1.01 if guard.condition.side == "above" else 0.99)
    sick = [HEALTHY | row for row in rows_of(guard, figure)]
    write_rows(healthy, "metrics.jsonl", sick)
    (diagnosis,) = diagnose(healthy).found
    watch = Watch(load_config(healthy))
    (warning,) = [warning for row in sick for warning in watch.see(row)]
    assert (diagnosis.level, diagnosis.name, diagnosis.step) == (
        "warning",
        guard.name,
        warning.step,
    )
    assert diagnosis.message == f"from step {warning.step} on: {warning.message}"


def test_what_was_over_by_the_end_is_said_to_be(healthy):
    change_rows(
        healthy, lambda rows: [row.update({"rollout/truncated/frac": 0.9}) for row in rows[5:12]]
    )
    (diagnosis,) = diagnose(healthy).found
    assert (diagnosis.name, diagnosis.step, diagnosis.value) == ("truncated", 8, 0.9)
    assert diagnosis.message.endswith("never end. By the last step this had ended.")


# --- files ----------------------------------------------------------------------------------------


def test_missing_and_doubled_steps(healthy):
    change_rows(healthy, lambda rows: rows.pop(6))
    assert found(healthy) == [("error", "steps_missing")] and diagnose(healthy).found[0].step == 7
    change_rows(healthy, lambda rows: rows.insert(6, {"step": 7} | HEALTHY))
    assert found(healthy) == []
    change_rows(healthy, lambda rows: rows.insert(7, {"step": 7} | HEALTHY))
    assert found(healthy) == [("error", "steps_doubled")] and diagnose(healthy).found[0].step == 7


@pytest.mark.parametrize("name", ["metrics.jsonl", "eval.jsonl", "samples.jsonl"])
def test_a_line_that_is_none_of_ours(healthy, name):
    with (healthy / name).open("a") as file:
        file.write("no row\n")
    assert found(healthy) == [("error", "unreadable_file")]
    (healthy / name).write_text((healthy / name).read_text().removesuffix("\n"))
    assert found(healthy) == [], "half a last line is what a killed run leaves, and is passed over"


@pytest.mark.parametrize(
    "rows", [[{"step": "x"}], [{"step": 1, "pass@1": 3, "split": "validation"}], [[1]]]
)
def test_rows_that_say_nonsense_are_no_crash(healthy, rows):
    for name in ("metrics.jsonl", "eval.jsonl", "samples.jsonl"):
        write_rows(healthy, name, rows)
    diagnose(healthy)


def test_a_damaged_checkpoint(healthy):
    newest = own_checkpoints(healthy)
    assert found(healthy) == []
    content = bytearray((newest / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (newest / "model.safetensors").write_bytes(content)
    (diagnosis,) = diagnose(healthy).found
    assert (diagnosis.level, diagnosis.name) == ("error", "damaged_checkpoint")
    assert (
        newest.name in diagnosis.message
        and "model.safetensors has other content than was written" in diagnosis.message
    )
    newest.rename(newest.with_name(f"damaged-{newest.name}"))
    assert found(healthy) == [("note", "set_aside_checkpoint")] and diagnose(healthy).is_healthy


def test_a_run_that_stopped(healthy):
    (healthy / "README.md").unlink()
    (diagnosis,) = diagnose(healthy).found
    assert (diagnosis.level, diagnosis.name) == ("warning", "unfinished")
    assert diagnosis.message.endswith(f"continue from step-000002: rlad train {healthy} --resume")
    (healthy / "checkpoints").unlink()
    assert (
        "continue from the start, as it has no checkpoint yet" in diagnose(healthy).found[0].message
    )


def test_a_run_that_is_going_on(healthy):
    (healthy / "README.md").unlink()
    with (healthy / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert found(healthy) == [("note", "training")]
        assert diagnose(healthy).state == "step 30 of 30, training"
    assert found(healthy) == [("warning", "unfinished")]


def test_resumed_with_other_versions(world, tmp_path):
    config = run_config(world, tmp_path / "run", optimization={"num_steps": 2})
    rlad.train(config)
    described = json.loads((tmp_path / "run" / "run.json").read_text())
    described["versions"]["torch"] = "1.0"
    (tmp_path / "run" / "run.json").write_text(json.dumps(described))
    for num_steps in (3, 4):
        config["optimization"]["num_steps"] = num_steps
        rlad.train(config, resume=True)
    notes = [
        each
        for each in diagnose(tmp_path / "run").found
        if each.name == "resumed_with_other_versions"
    ]
    assert [(each.level, each.step) for each in notes] == [("note", 2)], (
        "the second time with the same ones"
    )
    assert f"torch {rlad_torch_version()} instead of 1.0" in notes[0].message
    (tmp_path / "run" / "run.json").write_text("{")
    assert ("error", "unreadable_file") in found(tmp_path / "run")
    with pytest.raises(ValueError, match=r"run.json is not what a run has written"):
        rlad.train(config, resume=True)


def rlad_torch_version() -> str:
    from importlib import metadata

    return metadata.version("torch")


# --- learning -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("means", "name"),
    [
        ((0.3, 0.35, 0.25, 0.4), "no_learning"),
        ((0.3, 0.35, 0.25, 0.41), None),
        ((0.3, 0.4, 0.4), "no_learning"),
        ((0.3, 0.3), None),  # too few to tell
        ((0.3, 0.7, 0.6, 0.49), "best_long_ago"),
        ((0.3, 0.7, 0.6, 0.51), None),
        ((0.5, 0.4, 0.29), "worse_than_before"),
        ((0.5, 0.4, 0.31), None),
        ((0.5, 0.7, 0.1), "best_long_ago"),
    ],
)
def test_learning(healthy, means, name):
    write_validations(healthy, *means)
    assert found(healthy) == ([("warning", name)] if name else [])


# --- what is printed ------------------------------------------------------------------------------


def test_the_worst_comes_first_and_the_exit_code_says_that_something_is_wrong(healthy):
    change_rows(
        healthy,
        lambda rows: [row.update({"rollout/repeated/frac": 1.0}) for row in rows],
    )
    change_rows(healthy, lambda rows: rows.pop(0))
    newest = own_checkpoints(healthy)
    newest.rename(newest.with_name(f"damaged-{newest.name}"))
    assert [level for level, _ in found(healthy)] == ["error", "warning", "note"]
    result = CliRunner().invoke(main, ["doctor", str(healthy)])
    lines = result.stdout.splitlines()
    assert result.exit_code == 1 and lines[-1] == "2 things are wrong with it"
    assert [line[2:22] for line in lines[1:-1]] == [
        "✗ steps missing: met",
        "! identical completi",
        "· set aside checkpoi",
    ]
    answer = json.loads(CliRunner().invoke(main, ["doctor", str(healthy), "--json"]).stdout)
    assert (answer["healthy"], answer["state"]) == (False, "step 30 of 30, finished")
    assert [each["name"] for each in answer["found"]] == [
        "steps_missing",
        "identical_completions",
        "set_aside_checkpoint",
    ]
    assert answer["found"][1] | {"message": ""} == {
        "level": "warning",
        "name": "identical_completions",
        "message": "",
        "step": 6,
        "value": 1.0,
        "limit": 0.8,
    }


def test_infinite_figures_are_words_in_json(healthy):
    change_rows(
        healthy, lambda rows: [row.update({"objective/ratio/max": float("inf")}) for row in rows]
    )
    output = CliRunner().invoke(main, ["doctor", str(healthy), "--json"]).stdout
    assert json.loads(output, parse_constant=pytest.fail)["found"][0]["value"] == "inf"


def test_absurd_numbers_cost_neither_memory_nor_a_traceback(healthy):
    change_rows(healthy, lambda rows: rows.append({"step": 10**12} | HEALTHY))
    first = diagnose(healthy).found[0]
    assert (first.name, first.level) == ("steps_missing", "error") and "999999999" in first.message
    change_rows(healthy, lambda rows: rows[-1].update({"step": 31, "optimization/loss": 10**400}))
    (first,) = diagnose(healthy).found
    assert first.name == "unreadable_file" and "row 31 of metrics.jsonl, optim" in first.message
