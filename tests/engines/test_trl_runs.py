"""Whole runs with `engine.type = "trl"`: what they leave, what the commands read of it, one process
and two, interrupted and left alone."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl", reason="needs the optional package trl")
pytestmark = pytest.mark.trl

import torch
from click.testing import CliRunner
from safetensors.torch import load_file

import rlad
import rlad.training.run
from rlad.cli.main import main
from rlad.config.file import load_config, parse_config
from rlad.engines import native
from rlad.engines.base import StepResult
from rlad.engines.making import load_engine_student, make_engine
from rlad.errors import RunFailedError, UserError
from rlad.models.loading import load_language_model
from rlad.models.student import load_student
from rlad.runs.directory import RunDirectory
from rlad.stopping import StopRequested
from rlad.tasks import make_task
from running_servers import server_thread
from started_processes import start_process
from tiny_runs import StopAt, rlad_fails, run_config, write_config

SETTINGS: dict[str, Any] = {
    "objective": {"type": "trrd", "alpha": {"start": 0.8, "end": 0.3, "change_per_step": -0.1}},
    "optimization": {
        "num_steps": 4,
        "steps_per_rollout_batch": 2,
        "learning_rate": 3e-3,
        "schedule": "linear",
        "warmup_steps": 1,
        "kl_coef": 0.05,
    },
}
"""Everything of TRL's that has a state."""


def config_of(world: Path, run_dir: Path, trl: dict[str, Any] | None = None, **more: Any) -> Any:
    return run_config(world, run_dir, engine={"type": "trl", "trl": trl or {}}, **more)


def remains(run_dir: Path) -> dict[str, Any]:
    """All that must not depend on whether a run was interrupted."""
    run = RunDirectory(run_dir)
    kept: dict[str, Any] = {}
    for name in ("metrics.jsonl", "eval.jsonl", "samples.jsonl"):
        rows = run.read(name)
        kept[name] = [
            {key: value for key, value in row.items() if not key.startswith(("time/", "memory/"))}
            for row in rows
        ]
    for step, folder in run.checkpoints():
        for file in sorted(folder.rglob("*.safetensors")):
            kept[f"{step} {file.name}"] = {k: v.tolist() for k, v in load_file(file).items()}
        for file in sorted(folder.glob("*.pt")):
            kept[f"{step} {file.name}"] = str(torch.load(file, weights_only=True))
    return kept


def assert_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if found[name] != wanted[name]] == []


# --- a step is that of the native engine ----------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "trl"),
    [
        ({}, {}),
        ({"kl_coef": 0.1, "aggregation": "token_mean"}, {"per_device_train_batch_size": 3}),
        ({"advantage_scale": "none", "aggregation": "constant_length"}, {}),
    ],
)
def test_the_first_step_has_the_native_engines_loss_and_metrics(world, tmp_path, settings, trl):
    """On the rollouts that TRL has sampled."""
    sections = {"optimization": {"num_steps": 1} | settings}
    config = parse_config(config_of(world, tmp_path / "run", trl, **sections))
    task = make_task(**config.task.model_dump())
    results: list[StepResult] = []
    student = load_engine_student(config, None)
    engine = make_engine(config, student, task, before_work=lambda: None)
    engine.run(lambda result: bool(results.append(result)) or True)
    engine.close()
    (result,) = results
    groups = [
        replace(
            group,
            rollouts=tuple(
                replace(
                    one,
                    completion=replace(
                        one.completion, logprobs=(math.nan,) * len(one.completion.token_ids)
                    ),
                )
                for one in group.rollouts
            ),
        )
        for group in result.groups
    ]
    ours = native.make_engine(config, load_student(config), task, before_work=lambda: None)
    batch = ours.with_advantages(0, groups)
    batch.teacher_logprobs = batch.by_rollout(ours._ask_teacher(batch), batch.teacher_rows)
    if ours.reference_scorer is not None:
        rows = batch.training_rows
        scores = ours.reference_scorer.score(*batch.sequences(rows))
        batch.reference_logprobs = batch.by_rollout(scores, rows)
    assert [group.problem_index for group in groups] == [0, 1, 2, 3]
    wanted = ours.update(batch, [0, 1, 2, 3])
    assert wanted["objective/trained_tokens/count"] > 0
    for key, value in wanted.items():
        assert result.metrics[key] == pytest.approx(value, rel=2e-4, abs=2e-6), key
    after = dict(ours.student.model.named_parameters())
    for name, parameter in student.model.named_parameters():
        torch.testing.assert_close(parameter, after[name], rtol=0, atol=2e-5)
    ours.close()
    task.close()


def test_prompts_are_the_native_engines_tokens(world, tmp_path):
    config = parse_config(config_of(world, tmp_path / "run", optimization={"num_steps": 2}))
    task = make_task(**config.task.model_dump())
    engine: Any = make_engine(
        config, load_engine_student(config, None), task, before_work=lambda: None
    )
    rows = engine.rollouts.dataset()
    assert len(rows) == 8 and rows["index"][:] == list(range(8))
    asked: list[list[int]] = []
    inner = engine.trainer.request_of

    def request_of(number: int, row: Any, prompt: list[int], completion: list[int]) -> Any:
        request = inner(number, row, prompt, completion)
        asked.append(prompt)
        assert tuple(prompt) == tuple(request.prompt)
        assert tuple(completion) == tuple(request.completion)
        return request

    engine.trainer.request_of = request_of
    engine.run(lambda result: True)
    engine.close()
    assert len(asked) > 4


# --- a run directory ------------------------------------------------------------------------------


def test_the_embedded_pair_through_every_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sizes = ["optimization.num_steps=2", "rollout.prompts_per_batch=2", "rollout.group_size=4"]
    sizes += ["rollout.max_completion_tokens=40", "evaluation.every_steps=1"]
    sizes += ["evaluation.num_validation_problems=3", "evaluation.num_test_problems=3"]
    command = [sys.executable, "-m", "rlad", "train", "engine.type=trl", "run_dir=run", *sizes]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "test pass@1 after" in done.stdout and done.stderr == ""
    run = RunDirectory(tmp_path / "run")
    assert run.is_finished() and (tmp_path / "run" / "curve.png").is_file()
    rows = list(run.read("metrics.jsonl"))
    assert [row["step"] for row in rows] == [1, 2]
    assert {"reward/mean", "optimization/loss", "time/generation/seconds"} <= rows[0].keys()
    assert [(row["split"], row["step"]) for row in run.read("eval.jsonl")] == [
        ("test", 0),
        *(("validation", step) for step in range(3)),
        ("test", 2),
    ]
    samples = list(run.read("samples.jsonl"))
    assert [row["problem_index"] for row in samples] == [0, 2] and samples[0]["rollouts"]
    for arguments in (
        ["doctor", "run"],
        ["report", "run"],
        ["evaluate", "run", "--num-problems", "2"],
        ["sample", "run", "--num-prompts", "1"],
        ["export", "model", "run"],
    ):
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code in ((0, 1) if arguments[0] == "doctor" else (0,)), result.output
    found = json.loads(CliRunner().invoke(main, ["doctor", "run", "--json"]).stdout)
    assert [one for one in found["found"] if one["level"] == "error"] == []
    assert load_language_model("run-model").model.num_parameters() > 0


def test_a_comparison_of_runs_on_trl(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = config_of(world, tmp_path / "unused", optimization={"num_steps": 1})
    config.pop("run_dir")
    write_config(tmp_path / "run.toml", config)
    comparison = {"run": "run.toml", "seeds": [0], "methods": {"grpo": {}}}
    write_config(tmp_path / "compare.toml", comparison | {"directory": "found"})
    result = CliRunner().invoke(main, ["compare", "compare.toml"])
    assert result.exit_code == 0, result.output
    assert "grpo" in (tmp_path / "found" / "report.md").read_text()


# --- interrupted ----------------------------------------------------------------------------------


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    return lambda at: monkeypatch.setattr(rlad.training.run, "Stop", lambda: StopAt(at))


@pytest.mark.parametrize("lora", [None, {"rank": 2}])
def test_stopped_and_resumed_is_bit_for_bit_the_run_left_alone(world, tmp_path, stop_at, lora):
    sections = SETTINGS | ({"student": {"model": str(world / "student"), "lora": lora}})
    if lora is None:
        sections["student"] = {"model": str(world / "student")}
    stop_at(-1)
    rlad.train(config_of(world, tmp_path / "alone", **sections))
    # In evaluation and between steps; only the end of a rollout batch is a place to continue from.
    total = StopAt.num_checks
    for at in (3, total // 2, total - 3):
        config = config_of(world, tmp_path / f"stopped-{at}", **sections)
        stop_at(at)
        with pytest.raises(StopRequested):
            rlad.train(config)
        steps = [step for step, _ in RunDirectory(tmp_path / f"stopped-{at}").checkpoints()]
        assert all(step % 2 == 0 for step in steps)
        stop_at(-1)
        rlad.train(config, resume=True)
        assert_same(remains(tmp_path / f"stopped-{at}"), remains(tmp_path / "alone"))
    folder = RunDirectory(tmp_path / "alone").checkpoints()[-1][1]
    assert (folder / "adapter_config.json").is_file() == bool(lora)
    assert load_language_model(str(folder)).model is not None


def test_killed_and_resumed_is_bit_for_bit_the_run_left_alone(world, tmp_path):
    sections: dict[str, Any] = {
        "optimization": {"num_steps": 12},
        "evaluation": {"every_steps": 6},
        "checkpoints": {"every_seconds": 1e-6},
    }
    rlad.train(config_of(world, tmp_path / "alone", **sections))
    config = config_of(world, tmp_path / "killed", **sections)
    process = os.fork()
    if not process:
        rlad.train(config)
        os._exit(0)
    wait_for_rows(tmp_path / "killed", 4)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    assert not RunDirectory(tmp_path / "killed").is_finished()
    rlad.train(config, resume=True)
    found = remains(tmp_path / "killed")
    wanted = remains(tmp_path / "alone")
    assert_same({key: found[key] for key in wanted}, wanted)


def test_a_budget_ends_a_run_where_it_can_be_resumed_bit_for_bit(world, tmp_path):
    rlad.train(config_of(world, tmp_path / "alone", **SETTINGS))
    used_up_by_the_first_step = SETTINGS["optimization"] | {"max_teacher_tokens": 1}
    short = config_of(
        world, tmp_path / "run", **SETTINGS | {"optimization": used_up_by_the_first_step}
    )
    rlad.train(short)
    assert [step for step, _ in RunDirectory(tmp_path / "run").checkpoints()] == [0, 2]
    rlad.train(config_of(world, tmp_path / "run", **SETTINGS), resume=True)
    found = remains(tmp_path / "run")
    wanted = remains(tmp_path / "alone")
    # It was also tested at its first end.
    found["eval.jsonl"] = [
        row for row in found["eval.jsonl"] if (row["split"], row["step"]) != ("test", 2)
    ]
    assert_same(found, wanted)


def wait_for_rows(run_dir: Path, number: int) -> None:
    file = run_dir / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (file.is_file() and file.read_bytes().count(b"\n") >= number):
        assert time.monotonic() < deadline, "the run makes no steps"
        time.sleep(0.05)


# --- two processes --------------------------------------------------------------------------------


def torchrun(arguments: list[str]) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, "--nproc_per_node=2", "-m", "rlad", "train", *arguments]


def test_two_processes_interrupted_by_ctrl_c_and_resumed(world, tmp_path):
    sections: dict[str, Any] = {
        "rollout": {"prompts_per_batch": 4, "group_size": 4, "max_completion_tokens": 4},
        "evaluation": {"every_steps": 10_000},
    }
    paths = {name: tmp_path / name for name in ("stopped", "alone", "one")}
    files = {
        name: str(write_config(tmp_path / f"{name}.toml", config_of(world, path, **sections)))
        for name, path in paths.items()
    }
    # So long that it is stopped however slow this machine is; then it is made shorter.
    process = start_process(torchrun([files["stopped"], "optimization.num_steps=10000"]), {})
    wait_for_rows(paths["stopped"], 2)
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert errors.count("rlad: stopped by SIGINT; a checkpoint is written") == 1, errors
    stopped_at = RunDirectory(paths["stopped"]).newest_checkpoint()[0]
    assert stopped_at >= 2
    length = f"optimization.num_steps={stopped_at + 1}"
    for arguments in ([str(paths["stopped"]), "--resume", length], [files["alone"], length]):
        command = torchrun(arguments)
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        printed = done.stdout.count("files and next commands")
        assert printed == 1, "the main process alone prints"
    found = remains(paths["stopped"])
    wanted = remains(paths["alone"])
    # It also has the checkpoint where it was stopped.
    assert_same({name: found[name] for name in wanted}, wanted)

    # One process draws other completions, of the same problems, for an equal student.
    rlad.train(load_config(files["one"], ["optimization.num_steps=2"]))
    one = remains(paths["one"])
    assert one["eval.jsonl"][0] == wanted["eval.jsonl"][0]
    assert len(one["samples.jsonl"]) == 2
    for mine, theirs in zip(one["samples.jsonl"], wanted["samples.jsonl"], strict=False):
        assert mine["problem_index"] == theirs["problem_index"]
        assert mine["prompt_token_ids"] == theirs["prompt_token_ids"]
        assert len(mine["rollouts"]) == len(theirs["rollouts"])
    with pytest.raises(UserError, match="it is of another run: processes 2 there, 1 here"):
        config = load_config(paths["alone"], [f"optimization.num_steps={stopped_at + 2}"])
        rlad.train(config, resume=True)


# --- teachers, and what is refused ----------------------------------------------------------------


@pytest.mark.serve
def test_a_served_teacher(world, tmp_path):
    for package in ("fastapi", "uvicorn"):
        pytest.importorskip(package, reason=f"needs the optional package {package}")
    model = load_language_model(str(world / "teacher"))
    with server_thread(model, max_context_tokens=512) as server:
        teacher = {"type": "served", "urls": [server.url], "model": "tiny", "tolerance": 0.01}
        config = config_of(world, tmp_path / "served", optimization={"num_steps": 2})
        rlad.train(config | {"teacher": teacher})
    rlad.train(config_of(world, tmp_path / "local", optimization={"num_steps": 2}))
    served, local = (
        next(RunDirectory(tmp_path / name).read("metrics.jsonl")) for name in ("served", "local")
    )
    assert served["teacher/log_ratio/mean"] == pytest.approx(local["teacher/log_ratio/mean"], 1e-4)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["engine.trl.use_vlm=true"], "engine.trl.use_vlm is not a setting of TRL's"),
        (["engine.trl.learning_rate=1.0"], "trl.learning_rate is decided by optimization.learning"),
        (["engine.trl.epsilon=0.3"], "epsilon = 0.3 belongs to TRL's own loss"),
        (["engine.trl.per_device_train_batch_size=5"], "an optimiser step has 12 completions, whi"),
        (["engine.trl.gradient_accumulation_steps=24"], "an optimiser step has 12 completions, wh"),
        (["engine.trl.use_vllm=true"], "engine.trl.use_vllm needs vLLM, which is not installed"),
        (["engine.trl.fsdp=full_shard"], "engine.trl.fsdp shards the student over processes, but"),
        (["engine.trl.optim=none"], "TRL cannot make this run: none is not a valid OptimizerN"),
        (["objective=sft"], "objective 'sft' is not available on TRL; use one of"),
        (["objective=opd_then_grpo"], "objective 'opd_then_grpo' is not available on TRL; use"),
        (["teacher={type='ema'}"], "teacher.type = 'ema' is not available on TRL; name a model"),
        (
            [
                "teacher={type='privileged', teacher={type='local', model='embedded/teacher'}}",
                "teacher.context={answer=true}",
            ],
            "teacher.context.without_success = 'silent' is not available on TRL; set it to 'plain'",
        ),
        (["rollout.engine=vllm"], "rollout.engine = 'vllm' is not available on TRL; set it to 'na"),
        (
            ["optimization.steps_per_rollout_batch=2", "evaluation.every_steps=3"],
            "evaluation.every_steps = 3 with optimization.steps_per_rollout_batch = 2 is not avail",
        ),
        (
            ["optimization.steps_per_rollout_batch=2", "optimization.num_steps=5"],
            "optimization.num_steps = 5 with optimization.steps_per_rollout_batch = 2 is not avail",
        ),
        (["student.device=cuda:1"], "student.device = 'cuda:1' is not available on TRL; set it"),
        (["student.lora={target_modules=['nothing']}"], "student.lora.target_modules = ['nothing'"),
        (
            ["student.lora={target_modules=['lm_head']}"],
            "lm_head in student.lora.target_modules is not",
        ),
        (["engine.trl.teacher_is_sharded=true"], "teacher_is_sharded shards the teacher over"),
        (
            ["engine.trl.teacher_is_sharded=true", "teacher.random_weights=true"],
            "teacher.random_weights = True with engine.trl.teacher_is_sharded is not available",
        ),
        (
            ["engine.trl.teacher_is_sharded=true", "teacher.quantization=int8"],
            "teacher.quantization = 'int8' with engine.trl.teacher_is_sharded is not available",
        ),
    ],
)
def test_a_mistake_is_one_sentence_and_writes_nothing(world, tmp_path, overrides, sentence):
    file = write_config(tmp_path / "run.toml", config_of(world, tmp_path / "run"))
    assert sentence in rlad_fails("train", file, *overrides)
    assert not (tmp_path / "run").exists()


def test_a_mistake_of_ours_is_not_said_to_be_trls(world, tmp_path, monkeypatch):
    def make_teacher(*_: Any) -> Any:
        raise TypeError("a bug")

    monkeypatch.setattr("rlad.engines.trl.engine.make_teacher", make_teacher)
    with pytest.raises(TypeError, match="a bug"):
        rlad.train(config_of(world, tmp_path / "run"))


def test_the_native_engine_refuses_several_processes(world, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    file = write_config(tmp_path / "run.toml", run_config(world, tmp_path / "run"))
    found = rlad_fails("train", file)
    assert "2 processes were started, but engine.type = 'native' trains in a single one" in found


def test_a_data_set_without_problems(world, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    config = config_of(world, tmp_path / "run", task={"path": str(tmp_path / "empty.jsonl")})
    assert "empty.jsonl" in rlad_fails("train", write_config(tmp_path / "run.toml", config))


def test_a_gradient_that_is_not_finite_stops_the_run(world, tmp_path):
    """TRL would continue with broken weights."""
    config = parse_config(config_of(world, tmp_path / "run"))
    task = make_task(**config.task.model_dump())
    student = load_engine_student(config, None)
    engine = make_engine(config, student, task, before_work=lambda: None)
    weight: Any = student.model.get_input_embeddings().weight
    weight.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(RunFailedError, match="step 1: the gradient is not finite, and TRL"):
        engine.run(lambda result: True)
    assert weight.isfinite().all() and engine.resume_point is None


def test_without_trl(world, tmp_path, monkeypatch):
    file = write_config(tmp_path / "run.toml", config_of(world, tmp_path / "run"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found = rlad_fails("train", file)
    assert found.endswith("not installed; install it with: pip install 'rlad[trl]'.")
