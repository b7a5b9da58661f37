"""`rlad check`: its trial against training itself, its warnings, its estimates, and that it leaves
nothing behind."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from transformers import AutoModelForCausalLM

from rlad.checks.check import CheckReport, check_run
from rlad.checks.memory import MemoryEstimate, compare_memory, estimate_memory, teacher_bytes
from rlad.checks.trial import Trial, describe_trial, run_trial, shrunken, without_cache
from rlad.cli.check import print_report
from rlad.cli.main import main
from rlad.config.file import parse_config
from rlad.config.run import LoraConfig
from rlad.config.teacher import (
    CachedTeacherConfig,
    EMATeacherConfig,
    LocalTeacherConfig,
    SeveralTeachersConfig,
)
from rlad.engines.base import StepResult
from rlad.engines.native.loop import NativeEngine
from rlad.models.adapters import add_lora, save_adapter
from rlad.models.loading import load_language_model, pick_device
from rlad.models.student import load_student
from rlad.scoring.tiles import LOGITS_PER_CHUNK, LOGITS_PER_TILE
from rlad.teachers.local import LocalTeacher, quantization_config
from rlad.teachers.several import TeacherByTask
from tiny_runs import rlad_fails, run_config, write_config, write_model

CPU = "cpu"


def checked(world: Path, run_dir: Path, **sections: Any) -> CheckReport:
    return check_run(parse_config(run_config(world, run_dir, **sections)))


def levels(report: CheckReport) -> dict[str, str]:
    return {finding.subject: finding.level for finding in report.findings}


def message(report: CheckReport, subject: str) -> str:
    (found,) = [finding.message for finding in report.findings if finding.subject == subject]
    return found


def check_command(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["check", *map(str, arguments)])


def files_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- the trial ------------------------------------------------------------------------------------


def listen(patch: pytest.MonkeyPatch, kind: Any) -> list[Any]:
    """The requests of each call of a kind of teacher, and its answers."""
    calls: list[Any] = []
    submit = kind.submit

    def listening(self: Any, requests: Any) -> Any:
        answers = submit(self, requests)
        calls.append((list(requests), answers))
        return answers

    patch.setattr(kind, "submit", listening)
    return calls


def test_the_trial_says_what_trrd_does_with_each_token(world, tmp_path, monkeypatch):
    """Against the rule of METHODS worked by hand: with alpha .5 and clips .2/.28 a positive token
    is gated where the clamped log-ratio exceeds 2 log 1.28, a negative one where it is below 2 log
    .8; every second completion has a positive advantage.
    """
    config = parse_config(run_config(world, tmp_path / "run"))
    calls = listen(monkeypatch, LocalTeacher)
    trial = run_trial(config)
    requests, answers = calls[0]
    student = LocalTeacher(load_student(config), temperature=1.0, tokens_per_batch=10_000)
    theirs = [answer.result() for answer in answers]
    ratios = [a - b for a, b in zip(student.logprobs(requests), theirs, strict=True)]
    assert trial.num_completions == len(requests) == 12 and trial.max_tokens == 4
    ratio = torch.cat(ratios)
    positive = torch.cat([torch.full((len(r),), i % 2 == 0) for i, r in enumerate(ratios)])
    clamped = ratio.clamp(-1, 1)
    gated_positive = (clamped > 2 * math.log(1.28))[positive].float().mean()
    gated_negative = (clamped < 2 * math.log(0.8))[~positive].float().mean()
    metrics = trial.metrics
    assert metrics["objective/gated_positive/frac"] == pytest.approx(float(gated_positive))
    assert metrics["objective/gated_negative/frac"] == pytest.approx(float(gated_negative))
    assert 0 < gated_positive < 1 and 0 < gated_negative < 1
    assert metrics["objective/clamped/frac"] == pytest.approx(
        float((ratio.abs() > 1).float().mean())
    )
    assert metrics["teacher/log_ratio/mean"] == pytest.approx(float(ratio.mean()), abs=1e-5)
    middle = sorted(ratio.tolist())[round(0.5 * (len(ratio) - 1))]
    assert metrics["teacher/log_ratio/q50"] == pytest.approx(middle, abs=1e-5)


@pytest.mark.parametrize("alpha", [1.0, 0.9])
def test_the_trial_uses_the_knobs_of_the_run(world, tmp_path, alpha):
    """alpha .9 never gates (METHODS)."""
    objective = {"type": "trrd", "alpha": alpha}
    trial = run_trial(parse_config(run_config(world, tmp_path / "run", objective=objective)))
    for sign in ("positive", "negative"):
        assert trial.metrics[f"objective/gated_{sign}/frac"] == 0


def test_check_leaves_everything_as_it_was(world, tmp_path):
    """No run directory, no cache, and the models' files untouched."""
    before = files_of(world)
    teacher = {
        "type": "cached",
        "directory": str(tmp_path / "cache"),
        "teacher": {"model": str(world / "teacher")},
    }
    config = run_config(world, tmp_path / "run") | {"teacher": teacher}
    report = check_run(parse_config(config))
    assert report.trial is not None and not report.errors
    assert list(tmp_path.iterdir()) == [] and files_of(world) == before


@pytest.mark.parametrize("num_tasks", [2, 6])
def test_the_teacher_of_each_task_is_asked(world, tmp_path, monkeypatch, num_tasks):
    """Four prompts in all, or one for each of more tasks; a batch of two prompts gives the trial no
    fewer."""
    config = run_config(world, tmp_path / "run", rollout={"prompts_per_batch": 2})
    names = [f"task{i}" for i in range(num_tasks)]
    config["task"] = {"type": "several", "tasks": dict.fromkeys(names, config["task"])}
    config["teacher"] = {"type": "several", "teachers": dict.fromkeys(names, config["teacher"])}
    calls = listen(monkeypatch, TeacherByTask)
    run_trial(parse_config(config))
    asked = [request.problem.task for request in calls[0][0]]
    assert asked == [name for name in names for _ in range(3)]


def test_a_trial_is_small_and_of_whole_rollout_batches(world, tmp_path):
    config = run_config(
        world, tmp_path / "run", rollout={"prompts_per_batch": 12, "max_completion_tokens": 200}
    )
    config["optimization"] |= {"steps_per_rollout_batch": 3}
    small = shrunken(parse_config(config)).rollout
    assert (small.prompts_per_batch, small.group_size) == (6, 3)
    assert small.max_completion_tokens == 64


def test_a_cache_is_taken_away_wherever_it_is():
    local = LocalTeacherConfig(model="m")
    inner = {"type": "cached", "teacher": {"model": "m"}}
    privileged = {"type": "privileged", "teacher": inner}
    several = SeveralTeachersConfig.model_validate(
        {"type": "several", "teachers": {"a": inner, "b": {"model": "n"}}}
    )
    assert without_cache(CachedTeacherConfig.model_validate(inner)) == local
    assert without_cache(several).teachers == {"a": local, "b": LocalTeacherConfig(model="n")}
    config = parse_config(
        {"student": {"model": "s"}, "teacher": privileged, "task": {"type": "knights_and_knaves"}}
    )
    assert without_cache(config.teacher).teacher == local


# --- its warnings ---------------------------------------------------------------------------------


def test_the_student_itself_is_no_teacher(world, tmp_path):
    report = checked(world, tmp_path / "run", teacher={"model": str(world / "student")})
    assert levels(report)["log πS - log πT"] == "warning" and not report.errors
    assert "says what the student says" in message(report, "log πS - log πT")


def test_a_moving_average_may_begin_as_the_student(world, tmp_path):
    config = run_config(world, tmp_path / "run") | {"teacher": {"type": "ema"}}
    report = check_run(parse_config(config))
    assert levels(report)["log πS - log πT"] == "ok"
    assert "begins as the student itself" in message(report, "log πS - log πT")


@pytest.mark.parametrize(
    ("teacher", "level"),
    [
        ({"type": "privileged", "teacher": {"type": "ema"}}, "ok"),
        ({"type": "several", "combine": "mixture", "teachers": {"a": {"type": "ema"}}}, "ok"),
        (
            {
                "type": "several",
                "combine": "mixture",
                "teachers": {"a": {"type": "ema"}, "b": {"model": "m"}},
            },
            "warning",
        ),
    ],
)
def test_a_moving_average_is_seen_inside_of_other_teachers(world, tmp_path, teacher, level):
    config = parse_config(run_config(world, tmp_path / "run") | {"teacher": teacher})
    close = {f"teacher/log_ratio/{name}": 0.001 for name in ("mean", "q05", "q50", "q95")}
    findings = describe_trial(trial_with(close), config)
    assert {finding.subject: finding.level for finding in findings}["log πS - log πT"] == level


def test_a_teacher_of_another_world_is_doubtful(tmp_path, world):
    """The teacher is almost sure of a token that the student hardly ever samples."""
    folder = write_model(tmp_path / "sure", seed=2)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight.mul_(40)
    model.save_pretrained(folder)
    report = checked(world, tmp_path / "run", teacher={"model": str(folder)})
    assert levels(report)["teacher far away"] == "warning"
    assert "half of the student's own tokens very unlikely" in message(report, "teacher far away")


def test_a_teacher_without_answers_cannot_work(world, tmp_path):
    folder = write_model(tmp_path / "broken", seed=2)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    model.save_pretrained(folder)
    toml = write_config(
        tmp_path / "run.toml", run_config(world, tmp_path / "run", teacher={"model": str(folder)})
    )
    result = check_command(toml)
    assert result.exit_code == 2 and "no finite log-prob for 100.0% of the tokens" in result.stdout
    assert "✗ trial" in result.stdout and "this cannot work" in result.stdout


def trial_with(metrics: dict[str, float], seconds: dict[str, float] | None = None) -> Trial:
    usual = {f"teacher/log_ratio/{name}": 0.1 for name in ("mean", "q05", "q50", "q95")}
    usual |= {
        "objective/gated_positive/frac": 0.1,
        "objective/gated_negative/frac": 0.05,
        "objective/dropped_tokens/count": 0,
        "objective/trained_tokens/count": 100,
        "rollout/completion_tokens/mean": 2.0,
        "rollout/truncated/frac": 0.2,
        "memory/peak/bytes": 2.0**30,
    }
    return Trial(12, 4, usual | metrics, "our own decoder", seconds or {"update": 1.0})


@pytest.mark.parametrize(
    ("metrics", "warned"),
    [
        ({}, set()),
        ({"objective/gated_positive/frac": 0.51}, {"nearly all gated"}),
        ({"objective/gated_negative/frac": 0.51}, {"nearly all gated"}),
        ({"teacher/log_ratio/q50": -1.01}, {"teacher far away"}),
        ({"objective/dropped_tokens/count": 4}, {"teacher coverage"}),
        ({"rollout/truncated/frac": 1.0, "reward/zero_variance/frac": 1.0}, set()),
    ],
)
def test_the_runs_guards_speak_of_the_trial(world, tmp_path, metrics, warned):
    """What the trial's own shortness and verdicts make of a figure is no warning."""
    config = parse_config(run_config(world, tmp_path / "run"))
    findings = describe_trial(trial_with(metrics), config)
    assert {finding.subject for finding in findings if finding.level == "warning"} == warned


# --- objectives -----------------------------------------------------------------------------------


def test_without_a_teacher_there_are_no_lines_about_one(world, tmp_path):
    report = checked(world, tmp_path / "run", objective={"type": "grpo"})
    assert report.trial is not None and "teacher" not in report.trial.seconds
    assert not {"vocabulary", "gated", "log πS - log πT"} & set(levels(report))
    assert "time" in levels(report)


@pytest.mark.parametrize(
    "objective", ["kdrl", "opd", "rlsd", "distilled_rl", "topd", "opd_then_grpo", "sft", "gkd"]
)
def test_every_objective_can_be_tried(world, tmp_path, objective):
    report = checked(world, tmp_path / "run", objective={"type": objective})
    assert not report.errors and report.trial is not None and "gated" not in levels(report)
    assert report.trial.seconds["update"] > 0
    assert "GiB were held" in message(report, "trial")


# --- time -----------------------------------------------------------------------------------------


def test_time_is_that_of_a_step_of_the_second_batch(world, tmp_path, monkeypatch):
    """In steps of half a batch: what is done once for both counts half."""
    config = run_config(world, tmp_path / "run")
    config["optimization"] |= {"steps_per_rollout_batch": 2}
    run = NativeEngine.run

    def by_hand(self: NativeEngine, after_step: Any) -> None:
        def timed(result: StepResult) -> bool:
            for key in list(result.metrics):
                if key.startswith("time/"):
                    del result.metrics[key]
            result.metrics["time/update/seconds"] = 9.0 if result.step <= 2 else 3.0
            if result.step % 2:
                result.metrics["time/teacher/seconds"] = 2.0
            return after_step(result)

        run(self, timed)

    monkeypatch.setattr(NativeEngine, "run", by_hand)
    assert run_trial(parse_config(config)).seconds == {"update": 3.0, "teacher": 1.0}


def test_time_names_its_parts_and_how_much_larger_the_run_is(world, tmp_path):
    """12 completions of 2 tokens each, and in the run 4 x 3 of at most 10."""
    rollout = {"prompts_per_batch": 4, "max_completion_tokens": 10}
    config = parse_config(run_config(world, tmp_path / "run", rollout=rollout))
    trial = trial_with({}, {"generation": 30.0, "old_policy": 1.0, "update": 9.0, "rewards": 0.01})
    step, whole = describe_trial(trial, config)[-2:]
    assert config.rollout.group_size == 3 and step.message == (
        "a step of the trial took 40.0 s (generation 30.0, old policy 1.0, update 9.0); one of the "
        "run has up to 5 times as many tokens"
    )
    # 4 steps of 200 s; the rest is what 30 s for 24 tokens make of the evaluations.
    assert "0.072 hours on the CPU if completions have 2 tokens" in whole.message
    assert "at most 0.36 if each has 10" in whole.message
    assert "0.22 for 4 steps, 0.14 for 3 validations" in whole.message


def test_the_whole_run_by_hand(world, tmp_path):
    config = parse_config(
        run_config(
            world,
            tmp_path / "run",
            rollout={"prompts_per_batch": 6, "group_size": 4, "max_completion_tokens": 100},
            optimization={"num_steps": 40, "steps_per_rollout_batch": 2, "learning_rate": 1e-3},
            evaluation={
                "every_steps": 20,
                "num_validation_problems": 4,
                "num_validation_samples": 1,
                "ood_task": {},
                "num_test_problems": 24,
                "num_test_samples": 2,
            },
        )
    )
    # 12 completions of 2 tokens; the run has 24 of 100: 100 times as many, 40 steps of 1.5 s.
    seconds = {"generation": 0.5, "update": 1.0}
    (found,) = [
        f for f in describe_trial(trial_with({}, seconds), config) if f.subject == "whole run"
    ]
    # Written: 1 s for 24 tokens; 3 validations of 4 and 2 tests of 48 completions of 100 tokens.
    assert f"{40 * 1.5 * 100 / 3600:.2g} for 40 steps" in found.message
    assert f"{(3 * 4 + 96) * 100 / 24 / 3600:.2g} for 3 validations" in found.message
    shortest = (40 * 1.5 * 100 + (3 * 4 + 96) * 100 / 24) * 2 / 100
    assert f"{shortest / 3600:.2g} hours on the CPU if completions have 2 tokens" in found.message


# --- memory ---------------------------------------------------------------------------------------


def memory(total: int, *, models: int = 0) -> MemoryEstimate:
    return MemoryEstimate(models, 0, 0, 0, 0, total - models, 0)


def test_memory_is_compared_with_what_is_free():
    assert compare_memory(memory(8), free=8, total=16).level == "ok"
    too_much = compare_memory(memory(9), free=8, total=16)
    assert too_much.level == "error" and "lower optimization.tokens_per_batch" in too_much.message
    never = compare_memory(memory(20, models=17), free=8, total=16)
    assert never.level == "error" and "use a smaller model, [student.lora]" in never.message


def test_models_that_may_not_fit_are_not_loaded(world, tmp_path, monkeypatch):
    monkeypatch.setattr("rlad.checks.check.free_and_total_memory", lambda device: (1, 10**12))
    report = checked(world, tmp_path / "run")
    assert levels(report)["memory"] == "error" and report.trial is None
    assert "check with --force" in message(report, "memory")
    forced = check_run(report.config, force=True)
    assert levels(forced)["memory"] == "warning" and forced.trial is not None
    assert not forced.errors


def test_what_the_estimate_cannot_use_is_one_finding_among_others(world, tmp_path):
    """The report stays whole, and names the model that the adapter does not fit."""
    pytest.importorskip("peft", reason="needs the optional package peft")
    student = {"lora": {"rank": 4, "target_modules": ["nope"]}}
    toml = write_config(tmp_path / "run.toml", run_config(world, tmp_path / "run", student=student))
    result = check_command(toml, "--json")
    (error,) = [
        finding for finding in json.loads(result.stdout)["findings"] if finding["level"] == "error"
    ]
    assert result.exit_code == 2 and error["subject"] == "memory"
    assert f"does not fit model {str(world / 'student')!r}" in error["message"]


@pytest.mark.parametrize("name", ["teacher", "teacher a"])
def test_devices_of_teachers_inside_of_others_are_looked_at(world, tmp_path, name):
    config, local = (
        run_config(world, tmp_path / "run"),
        {"model": str(world / "teacher"), "device": "cuda:3"},
    )
    cached = {"type": "cached", "teacher": local}
    config["teacher"] = (
        cached
        if name == "teacher"
        else {"type": "several", "combine": "mixture", "teachers": {"a": cached}}
    )
    report = check_run(parse_config(config), with_models=False)
    assert [error.subject for error in report.errors] == [
        "device"
    ] and "'cuda:3' cannot be used" in report.errors[0].message
    local["device"] = "cpu"
    found = message(check_run(parse_config(config), with_models=False), "device")
    assert found.endswith(f", {name} cpu")


@pytest.mark.parametrize("device", ["meta", "xpu"])
def test_only_devices_that_compute(device):
    with pytest.raises(ValueError, match=f"device '{device}' cannot be used on this machine"):
        pick_device(device)
    assert str(pick_device("cpu")) == CPU


def test_the_logits_of_a_tile_are_counted(world, tmp_path, monkeypatch):
    """Three times a tile of 16, float32. Picking the next token of a single row takes 7 logits and
    three times as much."""
    monkeypatch.setitem(LOGITS_PER_TILE, "cpu", 16)
    config = run_config(world, tmp_path / "run", student={"device": "cpu"})
    config["rollout"] |= {"max_batch_rows": 1}
    assert estimate_memory(parse_config(config), 4).logits == 4 * 3 * 16


def test_the_logits_of_the_rows_that_are_decoded_are_counted(world, tmp_path, monkeypatch):
    """Four rows of 7 logits, and of two of them at a time three times as much; tiles are
    smaller."""
    monkeypatch.setitem(LOGITS_PER_TILE, "cpu", 4)
    monkeypatch.setitem(LOGITS_PER_CHUNK, "cpu", 14)
    monkeypatch.setattr("rlad.scoring.tiles.MIN_CHUNK_TOKENS", 1)
    config = run_config(world, tmp_path / "run", student={"device": "cpu"})
    config["rollout"] |= {"max_batch_rows": 4}
    assert estimate_memory(parse_config(config), 4).logits == 4 * (4 * 7 + 3 * 2 * 7)


def test_each_teacher_adds_its_own_weights(world):
    local = LocalTeacherConfig(model=str(world / "teacher"))
    count = sum(
        p.numel() for p in AutoModelForCausalLM.from_pretrained(world / "teacher").parameters()
    )
    half = local.model_copy(update={"dtype": "bfloat16"})
    assert [teacher_bytes(one, 7, CPU) for one in (local, half)] == [4 * count, 2 * count]
    several = SeveralTeachersConfig(type="several", teachers={"a": local, "b": half})
    assert teacher_bytes(several, 7, CPU) == 6 * count
    assert teacher_bytes(CachedTeacherConfig(type="cached", teacher=local), 7, CPU) == 4 * count
    assert [
        teacher_bytes(EMATeacherConfig(type="ema", update_rate=rate), 7, CPU) for rate in (0.1, 1.0)
    ] == [28, 0]


@pytest.mark.parametrize(
    ("device", "students"),
    [("cuda", ["cuda", "cuda:0"]), ("cuda:0", ["cuda", "cuda:0"]), ("cuda:1", ["cuda:1"])],
)
def test_a_teacher_on_another_gpu_takes_nothing_from_the_students(
    world, monkeypatch, device, students
):
    monkeypatch.setattr("rlad.checks.memory.pick_device", str)  # there need be no GPU
    local = LocalTeacherConfig(model=str(world / "teacher"), device=device)
    assert [
        who for who in ("cpu", "cuda", "cuda:0", "cuda:1") if teacher_bytes(local, 7, who)
    ] == students


def test_quantized_layers_are_counted_with_their_scales():
    """The embedded teacher: 698,496 weights, 663,552 of them in linear layers beside the output
    layer, which is the embedding; these have 5,952 outputs, and 13,056 groups of up to 64 inputs.
    """
    teacher = LocalTeacherConfig(model="embedded/teacher", dtype="bfloat16")
    int8, int4 = (
        teacher.model_copy(update={"quantization": quantization})
        for quantization in ("int8", "int4")
    )
    rest = 698_496 - 663_552
    assert (
        teacher_bytes(int8.model_copy(update={"dtype": "float32"}), 7, CPU)
        == 4 * rest + 663_552 + 5 * 5_952
        == 833_088
    )
    assert teacher_bytes(int8, 7, CPU) == 2 * rest + 663_552 + 5 * 5_952
    assert teacher_bytes(int4, 7, CPU) == 2 * rest + 663_552 // 2 + 4 * 13_056


@pytest.mark.quantization
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_quantized_teacher_is_as_large_as_estimated(dtype):
    pytest.importorskip("torchao", reason="needs the optional package torchao")
    teacher = LocalTeacherConfig(model="embedded/teacher", dtype=dtype, quantization="int8")
    model = load_language_model(
        teacher.model, dtype=dtype, quantization=quantization_config("int8")
    ).model
    assert sum(map(stored_bytes, model.parameters())) == teacher_bytes(teacher, 7, CPU)


def stored_bytes(parameter: Any) -> int:
    """Of a weight, or of the integers and scales that make one."""
    if not hasattr(parameter, "__tensor_flatten__"):
        return parameter.nbytes
    return sum(getattr(parameter, name).nbytes for name in parameter.__tensor_flatten__()[0])


@pytest.mark.peft
def test_an_adapter_costs_little(world, tmp_path):
    """Rank 2 on q and v of 2 layers with hidden size 16, 2 heads and 1 key head of 8: (16 + 16) * 2
    + (16 + 8) * 2, twice."""
    pytest.importorskip("peft", reason="needs the optional package peft")
    lora = {"rank": 2, "target_modules": ["q_proj", "v_proj"]}
    config = parse_config(
        run_config(world, tmp_path / "run", optimization={"kl_coef": 0.1}, student={"lora": lora})
    )
    count = sum(
        p.numel() for p in AutoModelForCausalLM.from_pretrained(world / "student").parameters()
    )
    estimate, trained = estimate_memory(config, 4), 2 * (32 * 2 + 24 * 2)
    assert (
        estimate.student_weights == 4 * (count + trained)
        and estimate.gradients_and_optimizer == 12 * trained
    )
    assert estimate.reference_weights == 0
    assert (
        sum(p.numel() for p in load_student(config).model.parameters() if p.requires_grad)
        == trained
    )


# --- the command ----------------------------------------------------------------------------------


def test_without_models_loads_no_weights(world, tmp_path, monkeypatch):
    """Checked with a student whose weights cannot be read."""
    folder = write_model(tmp_path / "student", seed=1)
    (folder / "model.safetensors").write_bytes(b"nothing")
    toml = write_config(
        tmp_path / "run.toml", run_config(world, tmp_path / "run", student={"model": str(folder)})
    )
    result = check_command(toml, "--without-models", "--json")
    report = json.loads(result.stdout)
    assert result.exit_code == 0 and report["trial"] is None and report["ok"] is True
    with_models = check_command(toml)
    assert (
        with_models.exit_code == 2
        and "no causal language model can be loaded" in with_models.stdout
    )


@pytest.mark.peft
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ({"peft_type": "NOPE"}, "(peft_type = 'NOPE') cannot be added to its base model"),
        ({"peft_type": "PROMPT_TUNING"}, "(peft_type = 'PROMPT_TUNING') cannot be added"),
        ({"peft_type": "VERA"}, "(peft_type = 'VERA') cannot be added"),
        ({"r": 5}, "do not fit: 4 tensors differ"),
        ({"target_modules": ["nope"]}, "cannot be added to its base model"),
        (None, "its adapter_model.safetensors cannot be read"),
    ],
)
def test_an_adapters_folder_is_looked_at_without_models(world, tmp_path, damage, said):
    pytest.importorskip("peft", reason="needs the optional package peft")
    folder = tmp_path / "adapter"
    student = load_language_model(str(world / "student")).model
    add_lora(
        student, LoraConfig(rank=2, target_modules=("q_proj",)), base=str(world / "student"), seed=0
    )
    save_adapter(student, folder)
    toml = write_config(
        tmp_path / "run.toml", run_config(world, tmp_path / "run", teacher={"model": str(folder)})
    )
    assert check_command(toml, "--without-models").exit_code == 0
    if damage is None:
        (folder / "adapter_model.safetensors").unlink()
    else:
        settings = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(settings | damage))
    result = check_command(toml, "--without-models", "--json")
    (error,) = [
        finding for finding in json.loads(result.stdout)["findings"] if finding["level"] == "error"
    ]
    assert result.exit_code == 2 and said in error["message"]
    assert said in rlad_fails("train", toml)


def test_json_has_everything(world, tmp_path):
    toml = write_config(tmp_path / "run.toml", run_config(world, tmp_path / "run"))
    result = check_command(toml, "--json")
    trial = json.loads(result.stdout)["trial"]
    assert trial["num_completions"] == 12 and "objective/clamped/frac" in trial["metrics"]
    assert set(trial["seconds"]) >= {"generation", "teacher", "update"}


def test_tokenizer_and_padding_of_the_student_are_told(tmp_path, world):
    student = write_model(tmp_path / "student", seed=2, vocab_size=9)
    report = checked(world, tmp_path / "run", student={"model": str(student)})
    assert message(report, "special tokens") == (
        "a completion ends with '<eos>'; begin None, pad '<pad>'"
    )
    assert message(report, "student").endswith(", 7 tokens in 9 rows")


def test_a_terminal_of_100_columns(world, tmp_path, capsys):
    """No line is longer, and what goes on in a further line is set in."""
    from rich.console import Console

    console = Console(width=100, force_terminal=True, highlight=False, color_system=None)
    print_report(checked(world, tmp_path / "run"), console)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100 and len(lines) < 70
    assert any(line.startswith(" " * 6) for line in lines)
