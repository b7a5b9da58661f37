"""Runs with `[engine] type = "trl"`: the native engine's rollouts, metrics and run directory, made by TRL's trainer."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.trl
pytest.importorskip("trl", reason="needs the optional package trl")

import rlad  # noqa: E402
import rlad.training.run  # noqa: E402
from rlad.checks.check import check_run  # noqa: E402
from rlad.config.file import parse_config  # noqa: E402
from rlad.config.run import RunConfig  # noqa: E402
from rlad.engines.base import StepResult  # noqa: E402
from rlad.errors import RunFailedError  # noqa: E402
from rlad.runs.checkpoints import write_manifest  # noqa: E402
from rlad.runs.directory import RunDirectory  # noqa: E402
from rlad.stopping import StopRequested  # noqa: E402
from tiny_runs import remains, rlad_fails, run_config, write_config  # noqa: E402

SECTIONS: dict[str, Any] = {
    "objective": {"type": "trrd"},
    "rollout": {"max_completion_tokens": 6, "temperature": 0.7},
    "optimization": {"tokens_per_batch": 60, "max_grad_norm": 0.5, "learning_rate": 1e-2},
}


def config_of(world: Path, run_dir: Path, engine: Any = "trl", **sections: Any) -> RunConfig:
    merged = {name: SECTIONS.get(name, {}) | sections.get(name, {}) for name in {**SECTIONS, **sections}}
    settings = {"type": engine} if isinstance(engine, str) else engine
    return parse_config(run_config(world, run_dir, engine=settings, **merged))


def rows_of(config: RunConfig, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return list(RunDirectory(config.directory).read(name))


@pytest.mark.parametrize(
    ("objective", "optimization"),
    [
        ({"type": "trrd"}, {"kl_coef": 0.05, "schedule": "cosine", "warmup_steps": 1}),
        ({"type": "kdrl", "kd_coef": 0.05}, {"aggregation": "token_mean", "weight_decay": 0.1}),
        ({"type": "grpo"}, {"aggregation": "constant_length", "advantage_scale": "none"}),
    ],
    ids=["trrd", "kdrl", "grpo"],
)
def test_the_run_is_that_of_the_native_engine(world, tmp_path, objective, optimization):
    configs = [
        config_of(world, tmp_path / engine, engine, objective=objective, optimization=optimization)
        for engine in ("native", "trl")
    ]
    for config in configs:
        rlad.train(config)
    native, by_trl = (rows_of(config) for config in configs)
    assert len(native) == len(by_trl) == 4
    for a, b in zip(by_trl, native, strict=True):
        assert b.keys() - a.keys() <= {"time/old_logprobs/seconds", "time/reference/seconds"}
        for key in (key for key in b if key in a and not key.startswith(("time/", "memory/"))):
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=2e-5), (b["step"], key)
    assert len({row["optimization/loss"] for row in native}) > 2
    samples = [[row["rollouts"][0]["completion"]["token_ids"] for row in rows_of(c, "samples.jsonl")] for c in configs]
    assert samples[0] == samples[1]
    names = [sorted(path.name for path in config.directory.iterdir()) for config in configs]
    assert names[0] == names[1] and RunDirectory(configs[1].directory).is_finished()
    tests = [[row["pass@1"] for row in rows_of(c, "eval.jsonl")] for c in configs]
    assert tests[0] == tests[1]


class StopInStep(rlad.training.reporter.Silent):
    """Asks to stop, as Ctrl-C would, when the step is done."""

    def __init__(self, stop_at: int) -> None:
        self.stop_at = stop_at

    def step(self, result: StepResult, num_steps: int) -> None:
        if result.step == self.stop_at:
            raise StopRequested(signal.SIGINT)


class SignalInStep(StopInStep):
    def step(self, result: StepResult, num_steps: int) -> None:
        if result.step == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)


TWO = {"optimization": {"steps_per_rollout_batch": 2, "schedule": "linear", "num_steps": 6}}


@pytest.fixture(scope="module")
def whole(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a run that nobody stops leaves behind."""
    return remains(rlad.train(config_of(world, tmp_path_factory.mktemp("whole") / "run", **TWO)).run_dir)


@pytest.mark.parametrize(
    ("reporter", "newest"),
    [(StopInStep(4), 4), (SignalInStep(3), 4), (StopInStep(3), 2)],
    ids=["behind a batch", "a signal between two steps", "an error between two steps"],
)
def test_a_stopped_run_goes_on_bit_for_bit(world, tmp_path, whole, reporter, newest):
    """Between two steps on one rollout batch a signal waits for the last of them, and an error costs both."""
    stopped = config_of(world, tmp_path / "stopped", **TWO)
    with pytest.raises(StopRequested):
        rlad.train(stopped, reporter=reporter)
    assert RunDirectory(stopped.directory).checkpoints()[-1][0] == newest
    assert rlad.training.run.how_to_go_on(stopped).endswith(f"rlad train {stopped.directory} --resume")
    rlad.train(stopped, resume=True)
    a, b = whole, remains(stopped.directory)
    kept = {name for name in a if name.endswith((".safetensors", ".jsonl"))}
    assert any(name.startswith("step 6") for name in kept)
    assert [name for name in kept if a[name] != b[name]] == []


def test_the_clock_and_skipped_steps_end_a_run_behind_a_whole_rollout_batch(world, tmp_path, poison):
    two = {"steps_per_rollout_batch": 2, "num_steps": 6}
    timed = config_of(world, tmp_path / "timed", optimization=two | {"max_seconds": 1e-9})
    rlad.train(timed)
    assert [row["step"] for row in rows_of(timed)] == [1, 2]
    poison(3)
    skipping = config_of(world, tmp_path / "run", objective={"type": "opd"}, optimization=two | {"max_skipped_steps": 1})
    with pytest.raises(RunFailedError, match="step 4: loss or gradient was not finite in 2 steps in a row"):
        rlad.train(skipping)
    assert RunDirectory(skipping.directory).checkpoints()[-1][0] == 4


@pytest.fixture(scope="module")
def finished(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rlad.train(config_of(world, tmp_path_factory.mktemp("finished") / "run")).run_dir


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "trainer_state.json"])
@pytest.mark.parametrize(
    "spoil",
    [lambda whole: whole[: len(whole) // 2], lambda whole: b"spoiled", lambda whole: None],
    ids=["half", "other bytes", "missing"],
)
def test_a_spoiled_state_is_one_sentence(finished, tmp_path, name, spoil):
    """Where the manifest fits to it, too; nothing of the run is changed, and without that folder it goes on."""
    run_dir = shutil.copytree(finished, tmp_path / "run")
    (_, before), (step, newest) = RunDirectory(run_dir).checkpoints()[-2:]
    content = spoil((newest / name).read_bytes())
    (newest / name).unlink()
    if content is not None:
        (newest / name).write_bytes(content)
    write_manifest(newest, step=step, run=json.loads((newest / "manifest.json").read_text())["run"])
    files = {path: path.read_bytes() for path in sorted(run_dir.rglob("*")) if path.is_file()}
    assert rlad_fails("train", run_dir, "--resume") == (
        f"rlad: checkpoint {newest} cannot be resumed: its {name} is missing or damaged. Delete that folder to go on from the "
        "one before it, if any."
    )
    assert {path: path.read_bytes() for path in sorted(run_dir.rglob("*")) if path.is_file()} == files
    shutil.rmtree(newest)
    assert RunDirectory(run_dir).newest_checkpoint()[1] == before


def test_between_two_steps_on_a_batch_it_does_not_go_on(world, tmp_path):
    config = config_of(world, tmp_path / "run", optimization={"steps_per_rollout_batch": 2, "num_steps": 1})
    rlad.train(config)
    longer = config.model_copy(update={"optimization": config.optimization.model_copy(update={"num_steps": 4})})
    with pytest.raises(ValueError, match=r"step 1 lies between two steps on one rollout batch, .* Delete that folder"):
        rlad.train(longer, resume=True)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"learning_rate": 1e-3}, "engine.trl.learning_rate is decided by the rest of the run's config"),
        ({"beta": 0.1}, "engine.trl.beta is decided by the rest"),
        ({"use_vllm": True}, "engine.trl.use_vllm is decided by the rest of the run's config, or by its sampler"),
        ({"logits": True}, "engine.trl.logits is no option of TRL's GRPOConfig: see TRL's GRPOConfig for what there is."),
        ({"run_nam": "mine"}, "engine.trl.run_nam is no option of TRL's GRPOConfig: did you mean 'run_name'?"),
        ({"report_to": "wandb"}, "engine.trl.report_to is what [logging] says for both engines; set logging.trackers instead."),
        ({"epsilon": 0.3}, "epsilon = 0.3 belongs to TRL's own loss"),
        ({"logging_nan_inf_filter": False}, "engine.trl.logging_nan_inf_filter is decided by the rest"),
        (
            {"teacher_is_sharded": True},
            "engine.trl.teacher_is_sharded splits the teacher over processes, and this is one alone",
        ),
        ({"teacher_is_sharded": "no"}, "engine.trl.teacher_is_sharded is 'no'; use true or false"),
        ({"deepspeed": "zero.json"}, "engine.trl.deepspeed is what starts the processes decides; use `rlad train --launch`"),
        ({"ddp_timeout": "abc"}, "engine.trl.ddp_timeout is 'abc'; use a positive number of seconds, such as 3600"),
        ({"ddp_timeout": 0}, "engine.trl.ddp_timeout is 0; use a positive number of seconds"),
        ({"ddp_timeout": True}, "engine.trl.ddp_timeout is True; use a positive number of seconds"),
    ],
)
def test_options_that_have_no_place_are_one_sentence(world, tmp_path, options, sentence):
    config = run_config(world, tmp_path / "run", engine={"type": "trl", "trl": options}, objective={"type": "trrd"})
    assert sentence in rlad_fails("train", write_config(tmp_path / "run.toml", config))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("teacher", "sentence"),
    [
        ({"type": "ema"}, "splits a teacher of type 'local' over the processes, and this one is 'ema'; leave it out"),
        (
            {"type": "served", "urls": ["http://127.0.0.1:9/v1"], "model": "m"},
            "splits a teacher of type 'local' over the processes, and this one is 'served'; leave it out",
        ),
        (
            {"keep": "cpu"},
            "teacher.keep = 'cpu' is not for engine.trl.teacher_is_sharded, by which each process keeps its share",
        ),
        ({"device": "cpu"}, "teacher.device = 'cpu' is not for engine.trl.teacher_is_sharded"),
        ({"quantization": "int8"}, "teacher.quantization = 'int8' is not for engine.trl.teacher_is_sharded"),
    ],
)
def test_teachers_that_cannot_be_split_are_one_sentence(world, tmp_path, teacher, sentence):
    engine = {"type": "trl", "trl": {"teacher_is_sharded": True}}
    config = run_config(world, tmp_path / "run", engine=engine, objective={"type": "trrd"})
    if "type" in teacher:
        del config["teacher"]
    config["teacher"] = config.get("teacher", {}) | teacher
    assert sentence in rlad_fails("train", write_config(tmp_path / "run.toml", config))
    without = parse_config(config | {"objective": {"type": "grpo"}})
    assert not without.splits_teacher, "an objective that asks no teacher splits none"


def test_options_reach_trl(world, tmp_path):
    """A tracker's place, and completions tables, are TRL's."""
    engine = {"type": "trl", "trl": {"log_completions": True, "num_completions_to_print": 0, "run_name": "mine"}}
    config = config_of(world, tmp_path / "run", engine, optimization={"num_steps": 1})
    rlad.train(config)
    assert RunDirectory(config.directory).is_finished()


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        ({"objective": {"type": "topd"}}, "objective 'topd' is not for engine.type = 'trl'; use engine.type = 'native'"),
        ({"objective": {"type": "sft"}}, "objective 'sft' is not for engine.type = 'trl'"),
        ({"objective": {"type": "kdrl", "masking": "group"}}, "objective.masking = 'group' needs verdicts"),
        (
            {"optimization": {"steps_per_rollout_batch": 4}},
            "evaluation.every_steps = 2 is no multiple of optimization.steps_per_rollout_batch = 4",
        ),
        (
            {"optimization": {"kl_coef": {"start": 0.1, "end": 0.0, "change_per_step": -0.1}}},
            "optimization.kl_coef must be one number with engine.type = 'trl'",
        ),
        ({"teacher": {"type": "ema"}}, "a teacher of type 'ema' moves with the student, which the native engine alone"),
        ({"engine": {"type": "trll"}}, "engine.type is 'trll': it must be 'native' or 'trl'"),
        ({"engine": {"type": "native", "trl": {"report_to": "none"}}}, "[engine.trl] belongs to engine.type = 'trl'"),
    ],
)
def test_runs_that_trl_cannot_make_are_one_sentence(world, tmp_path, sections, sentence):
    teacher = {"teacher": sections["teacher"]} if "teacher" in sections else {}
    sections = {"engine": {"type": "trl"}, "objective": {"type": "trrd"}} | sections
    config = run_config(world, tmp_path / "run", **sections) | teacher
    assert sentence in rlad_fails("train", write_config(tmp_path / "run.toml", config))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "finding"),
    [
        ({}, ("ok", "TRL is installed")),
        ({"learning_rat": 1.0}, ("error", "engine.trl.learning_rat is no option of TRL's GRPOConfig: see TRL's GRPOConfig")),
        ({"learning_rate": 1.0}, ("error", "engine.trl.learning_rate is decided by the rest of the run's config")),
    ],
)
def test_a_check_looks_at_the_engine(world, tmp_path, options, finding):
    report = check_run(config_of(world, tmp_path / "run", {"type": "trl", "trl": options}), with_models=False)
    (found,) = (one for one in report.findings if one.subject == "packages")
    assert (found.level, found.message[: len(finding[1])]) == finding


def test_the_engine_is_part_of_a_runs_digest(world, tmp_path):
    """A run that was made without a word about engines is one of the native engine's."""
    silent = parse_config(run_config(world, tmp_path / "run"))
    digests = [parse_config(run_config(world, tmp_path / "run", engine={"type": name})).digest for name in ("native", "trl")]
    assert silent.digest == digests[0] != digests[1]


def test_options_that_change_no_number_are_no_part_of_it(world, tmp_path):
    def digest(**options: Any) -> str:
        return config_of(world, tmp_path / "run", {"type": "trl", "trl": options}).digest

    assert digest() == digest(ddp_timeout=3600) == digest(teacher_is_sharded=True) == digest(log_completions=True)
    assert digest() != digest(adam_epsilon=1e-6)
