"""`rlad compare`: its config, and whole comparisons of tiny runs in processes of their own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from rlad.cli.main import main
from rlad.comparison import compare as compare_module
from rlad.comparison.compare import compare, final_runs, tuning_runs
from rlad.config.comparison import CompareConfig, folder_name, load_comparison, method_config
from rlad.config.file import dump_config, load_config
from rlad.config.objective import GRPOConfig, KDRLConfig, TRRDConfig
from rlad.runs.directory import EVAL, RunDirectory
from tiny_runs import (
    OFTEN_CORRECT,
    remains,
    rlad_fails,
    run_config,
    write_config,
    write_world,
)


def write_comparison(folder: Path, world: Path, **settings: Any) -> Path:
    """`compare.toml` beside the `run.toml` that its methods share; returns its path."""
    base = run_config(world, folder / "unused", objective={"type": "trrd", "alpha": 0.3})
    del base["run_dir"]
    write_config(folder / "run.toml", base)
    table = {
        "run": "run.toml",
        "directory": str(folder / "out"),
        "seeds": [0, 1],
        "methods": {"grpo": {}, "trrd": {}},
    }
    return write_config(folder / "compare.toml", table | settings)


def children() -> list[int]:
    """Process ids of the processes that this one has started."""
    found = subprocess.run(
        ["pgrep", "-P", str(os.getpid())], capture_output=True, text=True, check=False
    )
    return [int(pid) for pid in found.stdout.split()]


def rlad_output(*arguments: object) -> str:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


def load(folder: Path, world: Path, **settings: Any) -> tuple[CompareConfig, Path]:
    return load_comparison(write_comparison(folder, world, **settings))


# --- config ---------------------------------------------------------------------------------------


def test_a_method_with_another_kind_of_teacher_has_nothing_of_the_shared_one(
    tmp_path: Path, world: Path
) -> None:
    context = {"num_successes": 1}
    teacher = {"type": "privileged", "context": context, "teacher": {"type": "ema"}}
    methods = {"peers": {"objective": {"type": "trrd"}, "teacher": teacher}, "trrd": {}}
    comparison, folder = load_comparison(write_comparison(tmp_path, world, methods=methods))
    configs = {name: method_config(comparison, folder, name, seed=7) for name in methods}
    kinds = [config.teacher and config.teacher.type for config in configs.values()]
    assert kinds == ["privileged", "local"]


def test_a_methods_name_is_its_objective_or_preset_and_the_base_runs_settings_of_it_stay(
    tmp_path: Path, world: Path
) -> None:
    methods = {
        "grpo": {},
        "trrd": {},
        "dapo": {},
        "strong KD": {"objective": {"type": "kdrl", "kd_coef": 0.1}},
    }
    comparison, folder = load(tmp_path, world, methods=methods)
    configs = {name: method_config(comparison, folder, name, seed=7) for name in methods}
    assert configs["grpo"].objective == GRPOConfig()
    assert configs["trrd"].objective == TRRDConfig(alpha=0.3)
    assert (
        configs["dapo"].objective == GRPOConfig()
        and configs["dapo"].optimization.aggregation == "token_mean"
    )
    assert configs["strong KD"].objective == KDRLConfig(kd_coef=0.1)
    assert {config.seed for config in configs.values()} == {7}
    assert folder_name("strong KD") == "strong_KD"


def test_methods_of_other_names_have_the_shared_objective_and_may_change_it(
    tmp_path: Path, world: Path
) -> None:
    shared = {"objective": {"type": "kdrl", "kd_coef": 0.1}}
    methods = {"as shared": {}, "strong": {"objective": {"kd_coef": 0.2}}}
    comparison, folder = load(tmp_path, world, methods=methods, shared=shared)
    configs = [method_config(comparison, folder, name, seed=7) for name in methods]
    assert [config.objective for config in configs] == [
        KDRLConfig(kd_coef=0.1),
        KDRLConfig(kd_coef=0.2),
    ]
    # A name that is an objective keeps its meaning.
    shared = {"objective": {"type": "kdrl"}}
    comparison, folder = load(tmp_path, world, methods={"grpo": {}}, shared=shared)
    assert method_config(comparison, folder, "grpo", seed=7).objective == GRPOConfig()


def test_a_preset_is_stronger_than_the_shared_run_and_a_method_than_its_preset(
    tmp_path: Path, world: Path
) -> None:
    own = {"objective": {"type": "dapo", "clip_high": 0.3}, "optimization": {"learning_rate": 0.1}}
    path = write_comparison(tmp_path, world, methods={"grpo": {}, "dapo": {}, "own": own})
    # A resolved config, such as that of a run directory, spells out what a preset changes.
    (tmp_path / "run.toml").write_text(dump_config(load_config(tmp_path / "run.toml")))
    comparison, folder = load_comparison(path)
    grpo, dapo, own_dapo = (
        method_config(comparison, folder, name, seed=0) for name in ("grpo", "dapo", "own")
    )
    assert (grpo.optimization.aggregation, dapo.optimization.aggregation) == (
        "sequence_mean",
        "token_mean",
    )
    assert (
        own_dapo.objective == GRPOConfig(clip_high=0.3)
        and own_dapo.optimization.aggregation == "token_mean"
    )
    assert own_dapo.optimization.learning_rate == 0.1
    # The same on the command line, in any order.
    overrides = [
        "objective.clip_high=0.3",
        "objective=dr_grpo",
        "optimization.aggregation=token_mean",
    ]
    chosen = load_config(tmp_path / "run.toml", overrides)
    assert (chosen.optimization.advantage_scale, chosen.optimization.aggregation) == (
        "none",
        "token_mean",
    )
    assert chosen.objective == GRPOConfig(clip_low=0.2, clip_high=0.3)
    (tmp_path / "preset.toml").write_text(
        path.with_name("run.toml").read_text().replace('type = "trrd"', 'type = "dapo"')
    )
    assert (
        load_config(tmp_path / "preset.toml", ["objective=grpo"]).optimization.aggregation
        == "sequence_mean"
    )


def test_shared_settings_reach_every_run_and_nothing_else_differs(
    tmp_path: Path, world: Path
) -> None:
    shared = {"rollout": {"group_size": 4}, "optimization": {"max_seconds": 500.0}}
    comparison, folder = load(tmp_path, world, shared=shared)
    runs = final_runs(comparison, folder, {"trrd": 1e-2})
    assert [(run.method, run.config.seed) for run in runs] == [
        ("grpo", 0),
        ("trrd", 0),
        ("grpo", 1),
        ("trrd", 1),
    ]
    assert {run.config.rollout.group_size for run in runs} == {4}
    assert {run.config.optimization.max_seconds for run in runs} == {500.0}
    assert [run.config.optimization.learning_rate for run in runs] == [3e-3, 1e-2, 3e-3, 1e-2]
    same = [
        run.config.model_dump(exclude={"objective", "seed", "run_dir", "optimization"})
        for run in runs
    ]
    assert all(each == same[0] for each in same)


def test_methods_may_differ_in_the_sampler(tmp_path: Path, world: Path) -> None:
    own = {"objective": {"type": "trrd"}}
    correction = {"mode": "token_mask", "clip_min": 0.5}
    methods = {"own": own, "other": own | {"rollout": {"engine": "auto", "correction": correction}}}
    comparison, folder = load(tmp_path, world, methods=methods)
    rollouts = [run.config.rollout for run in final_runs(comparison, folder, {})]
    assert [one.engine for one in rollouts] == ["native", "auto", "native", "auto"]
    assert rollouts[1].correction.clip_min == 0.5
    assert {one.group_size for one in rollouts} == {rollouts[0].group_size}


def test_tuning_runs_are_the_same_search_for_all_and_do_not_look_at_the_test_split(
    tmp_path: Path, world: Path
) -> None:
    comparison, folder = load(
        tmp_path, world, tuning={"learning_rates": [1e-3, 1e-2], "seeds": [5, 6]}
    )
    grid = tuning_runs(comparison, folder)
    assert set(grid) == {(method, rate) for method in ("grpo", "trrd") for rate in (1e-3, 1e-2)}
    for (_, rate), runs in grid.items():
        assert [run.config.seed for run in runs] == [5, 6]
        assert all(run.config.optimization.learning_rate == rate for run in runs)
        assert all(
            run.config.evaluation.num_test_problems == 1 and run.config.ood_task is None
            for run in runs
        )
    paths = [run.path for runs in grid.values() for run in runs] + [
        run.path for run in final_runs(comparison, folder, {})
    ]
    assert len(set(paths)) == len(paths)


END_OF_GRID = "; this is an end of the grid, so a wider one may have a better rate"
SAME_FOLDER = {"a b": {"objective": {"type": "grpo"}}, "a_b": {"objective": {"type": "grpo"}}}
MISTAKES: dict[str, dict[str, Any]] = {
    "method 'trrd': sets rollout.group_size": {"methods": {"trrd": {"rollout": {"group_size": 2}}}},
    "method 'trrd': sets optimization.num_steps": {
        "methods": {"trrd": {"optimization": {"num_steps": 2}}}
    },
    "metods is an unknown key: did you mean 'methods'?": {"metods": {}},
    "method 'gropo': objective.type is 'gropo'": {"methods": {"gropo": {}}},
    "method 'trrd': sets student": {"methods": {"trrd": {"student": {"model": "x"}}}},
    "seeds = [1, 1] holds a value twice": {"seeds": [1, 1]},
    "tuning.learning_rates = [0.001, 0.001] holds a value twice": {
        "tuning": {"learning_rates": [1e-3, 0.001]}
    },
    "[shared] sets seed or run_dir": {"shared": {"seed": 3}},
    "baseline = 'sft' is not one of the methods grpo, trrd": {"baseline": "sft"},
    "uses no teacher, so max_teacher_tokens would never end it": {
        "shared": {"optimization": {"max_teacher_tokens": 9}}
    },
    "its objective depends on num_steps, but max_seconds or max_teacher_tokens may end": {
        "methods": {"opd_then_grpo": {}},
        "shared": {"optimization": {"max_seconds": 9.0}},
    },
    "would share one folder": {"methods": SAME_FOLDER},
    "tuning.learning_rates": {"tuning": {"learning_rates": []}},
    "nowhere.toml cannot be read": {"run": "nowhere.toml"},
    "rollout.group_sise is an unknown key: did you mean 'group_size'?": {
        "shared": {"rollout": {"group_sise": 3}}
    },
}


@pytest.mark.parametrize("sentence", MISTAKES)
def test_a_mistake_ends_in_one_sentence(sentence: str, tmp_path: Path, world: Path) -> None:
    assert sentence in rlad_fails(
        "compare", write_comparison(tmp_path, world, **MISTAKES[sentence])
    )


def test_a_comparison_without_methods_is_refused(tmp_path: Path) -> None:
    assert "methods is missing" in rlad_fails(
        "compare", write_config(tmp_path / "compare.toml", {"seeds": [0]})
    )


# --- whole comparisons ----------------------------------------------------------------------------


def test_a_failing_method_does_not_take_the_others_down_and_what_is_done_is_not_done_again(
    tmp_path: Path, world: Path
) -> None:
    methods = {
        "grpo": {},
        "broken": {"objective": {"type": "trrd"}, "teacher": {"model": str(world / "nowhere")}},
    }
    comparison, folder = load(tmp_path, world, methods=methods, seeds=[0], jobs=2)
    result = compare(comparison, folder)
    assert [(missing.method, missing.seed) for missing in result] == [("broken", 0)]
    assert "cannot be found or read" in result[0].reason and "seed-0.log" in result[0].reason
    page = (tmp_path / "out" / "report.html").read_text()
    assert "broken" in page and "cannot be found or read" in page
    run = tmp_path / "out" / "runs" / "grpo" / "seed-0"
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    lines: list[str] = []
    again = compare(comparison, folder, progress=lambda line, runs: lines.append(line))
    assert [missing.method for missing in again] == ["broken"]
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert "1 of 2 runs are done already" in lines
    planned = rlad_output("compare", folder / "compare.toml", "--dry-run")
    assert (
        f"done   {run}" in planned
        and f"to do  {tmp_path / 'out' / 'runs' / 'broken' / 'seed-0'}" in planned
    )
    # A limit is part of what a run is compared by, though a run can be resumed with another one.
    limited = comparison.model_copy(update={"shared": {"optimization": {"max_seconds": 600.0}}})
    with pytest.raises(ValueError, match=r"optimization\.max_seconds is None instead of 600\.0"):
        compare(limited, folder)
    # The same directory for a comparison under another budget is refused before anything is
    # trained.
    other = comparison.model_copy(update={"shared": {"rollout": {"group_size": 4}}})
    with pytest.raises(
        ValueError, match="has a run with other settings than this comparison needs for 'grpo'"
    ):
        compare(other, folder)


def test_a_run_that_is_killed_is_named_with_the_reason_of_this_time(
    tmp_path: Path, world: Path
) -> None:
    shared = {"optimization": {"num_steps": 100_000}}
    comparison, folder = load(tmp_path, world, methods={"trrd": {}}, seeds=[0], shared=shared)
    run = tmp_path / "out" / "runs" / "trrd" / "seed-0"
    run.parent.mkdir(parents=True)
    run.with_name("seed-0.log").write_text("rlad: an older sentence\n")

    def kill_the_child(line: str, runs: object) -> None:
        if (run / "metrics.jsonl").is_file():
            for child in children():
                os.kill(child, signal.SIGKILL)

    result = compare(comparison, folder, progress=kill_the_child)
    assert [missing.method for missing in result] == ["trrd"] and (
        tmp_path / "out" / "report.html"
    ).is_file()
    assert "killed by SIGKILL" in result[0].reason and "older" not in result[0].reason


def test_a_place_that_cannot_be_written_ends_in_one_sentence(tmp_path: Path, world: Path) -> None:
    (tmp_path / "out").write_text("a file")
    assert "out/runs/grpo cannot be written" in rlad_fails(
        "compare", write_comparison(tmp_path, world)
    )


def test_the_learning_rate_with_the_best_validation_is_taken(
    tmp_path: Path, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Where the runs, processes of their own, find the verifier.
    path = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, path)))
    tuning = {"learning_rates": [1e-7, 1e-2], "seeds": [9]}
    shared = {
        "evaluation": {"num_validation_problems": 2, "num_validation_samples": 32},
        "task": OFTEN_CORRECT,
    }
    methods = {
        "grpo": {},
        "broken": {"objective": {"type": "trrd"}, "teacher": {"model": str(world / "nowhere")}},
    }
    comparison, folder = load(
        tmp_path, world, seeds=[0], methods=methods, tuning=tuning, shared=shared, jobs=2
    )
    result = compare(comparison, folder)
    assert [missing.method for missing in result] == ["broken", "broken"]
    assert all(
        missing.reason.startswith("while its learning rate was tuned: ") for missing in result
    )
    scores = {}
    for rate in (1e-7, 1e-2):
        rows = list(
            RunDirectory(tmp_path / "out" / "tuning" / "grpo" / f"lr-{rate:g}" / "seed-9").read(
                EVAL
            )
        )
        final = next(row for row in reversed(rows) if row["split"] == "validation")
        assert final["step"] == 4
        correct = [problem["num_correct"] / problem["num_samples"] for problem in final["results"]]
        scores[rate] = sum(correct) / len(correct)
    assert scores[1e-7] != scores[1e-2]
    # Checkpoints are kept of the final run alone.
    checkpoints = [path.relative_to(tmp_path / "out") for path in tmp_path.rglob("step-*")]
    assert checkpoints and all(path.parts[0] == "runs" for path in checkpoints)
    chosen = final_runs(comparison, folder, {})[0].path / "config.toml"
    assert f"learning_rate = {max(scores, key=scores.__getitem__)}" in chosen.read_text()
    text = (tmp_path / "out" / "report.md").read_text()
    assert (
        "Learning rate of each method" in text and "validation 1e-07: failed, 0.01: failed" in text
    )
    # Of the two methods only grpo has a rate, and both rates are ends of the grid.
    assert text.count(END_OF_GRID) == 1


@pytest.mark.parametrize(
    ("scores", "is_end"),
    [((0.5, 0.6, 0.4), False), ((0.5, 0.6, 0.7), True), ((0.5, 0.5, 0.4), True), ((0.5,), False)],
)
def test_a_rate_at_an_end_of_the_grid_is_pointed_out(
    tmp_path: Path, world: Path, monkeypatch: pytest.MonkeyPatch, scores: Any, is_end: bool
) -> None:
    rates = [1e-3, 1e-2, 1e-1][: len(scores)]
    methods = {"grpo": {}}
    comparison, folder = load(tmp_path, world, methods=methods, tuning={"learning_rates": rates})
    by_rate = dict(zip(rates, scores, strict=True))
    monkeypatch.setattr(compare_module, "_train", lambda *_: [])
    monkeypatch.setattr(
        compare_module,
        "_validation",
        lambda runs: by_rate[runs[0].config.optimization.learning_rate],
    )
    _, (_, line), _ = compare_module._tune(comparison, folder, lambda *_: None)
    assert line.endswith(END_OF_GRID) == is_end


def test_an_interrupted_comparison_goes_on_where_it_stopped(tmp_path: Path, world: Path) -> None:
    shared = {"optimization": {"num_steps": 120}, "evaluation": {"every_steps": 110}}
    path = write_comparison(tmp_path, world, methods={"trrd": {}}, seeds=[0], shared=shared)
    run = tmp_path / "out" / "runs" / "trrd" / "seed-0"
    command = [sys.executable, "-m", "rlad", "compare", str(path)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
    )
    while not (run / "metrics.jsonl").is_file():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and f"continue with: rlad compare {path}" in errors, errors
    assert RunDirectory(run).checkpoints() and not RunDirectory(run).is_finished()
    subprocess.run(command, check=True, capture_output=True)
    interrupted = remains(run)

    settings = {
        "methods": {"trrd": {}},
        "seeds": [0],
        "shared": shared,
        "directory": str(tmp_path / "two"),
    }
    straight = write_comparison(tmp_path, world, **settings)
    subprocess.run([*command[:-1], str(straight)], check=True, capture_output=True)
    expected = remains(tmp_path / "two" / "runs" / "trrd" / "seed-0")
    assert interrupted.keys() == expected.keys()
    differing = [
        name
        for name in expected
        if "trainer/state.json" not in name and interrupted[name] != expected[name]
    ]
    assert not differing
