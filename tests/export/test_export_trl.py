"""`rlad export trl`: the script runs as it stands, says what the config says, and refuses what TRL cannot train."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

pytestmark = pytest.mark.trl
pytest.importorskip("trl", reason="needs the optional package trl")

from rlad.cli.main import main  # noqa: E402
from rlad.config.file import load_config, parse_config  # noqa: E402
from rlad.config.run import LoraConfig, RolloutConfig, RunConfig  # noqa: E402
from rlad.engines.trl.engine import TRLEngine  # noqa: E402
from rlad.export.trl_script import export_trl, literal  # noqa: E402
from rlad.models.loading import load_language_model  # noqa: E402
from rlad.models.student import load_student  # noqa: E402
from rlad.rollouts.prompts import prompt_token_ids  # noqa: E402
from rlad.tasks import make_task  # noqa: E402
from running_servers import server_thread  # noqa: E402
from tiny_runs import rlad_fails, run_config, write_config, write_tokenizer  # noqa: E402

TINY = {"num_steps": 2, "steps_per_rollout_batch": 2}
CHAT = (
    "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    "{% if thinking is defined and not thinking %}0 {% endif %}{% if add_generation_prompt %}={% endif %}"
)


def tiny_run(world: Path, folder: Path, **sections: Any) -> dict[str, Any]:
    """Two optimiser steps on one rollout batch of 24 completions."""
    sections = {"optimization": TINY, "rollout": {"group_size": 6}, **sections}
    return run_config(world, folder / "run", seed=3, **sections)


def script_of(folder: Path, config: dict[str, Any], *arguments: str) -> Path:
    toml = write_config(folder / "run.toml", config)
    result = CliRunner().invoke(main, ["export", "trl", str(toml), *arguments, "--output", str(folder / "script.py")])
    assert result.exit_code == 0, result.output
    return folder / "script.py"


def run(script: Path, *command: str) -> None:
    """In a process of its own, from a folder that is not the repository's."""
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *command, str(script)], cwd=script.parent, env=variables, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]


def logs_of(output: Path) -> list[dict[str, Any]]:
    state = max(output.glob("checkpoint-*/trainer_state.json"), key=lambda path: int(path.parent.name.split("-")[1]))
    return [row for row in json.loads(state.read_text())["log_history"] if "loss" in row]


def namespace_of(script: str) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "a script that is looked at"}
    exec(compile(script, "script.py", "exec"), names)
    return names


def assert_two_steps(output: Path) -> None:
    """Finite losses and rewards, a teacher that was asked, and weights that moved."""
    logs = logs_of(output)
    assert [row["step"] for row in logs] == [1, 2]
    assert all(math.isfinite(row[key]) and row["grad_norm"] > 0 for row in logs for key in ("loss", "objective/ratio/mean"))
    assert 0 < logs[0]["reward"] < 1 and logs[0]["teacher/tokens/count"] > 0
    assert abs(logs[0]["teacher/log_ratio/mean"]) > 1e-3
    assert (output / "model.safetensors").is_file()


# --- it runs ----------------------------------------------------------------------------------------------------------


def test_the_script_runs_as_it_stands(tmp_path, world):
    run(script_of(tmp_path, tiny_run(world, tmp_path)))
    assert_two_steps(tmp_path / "run-trl")


def test_the_script_runs_under_torchrun(tmp_path, world):
    script = script_of(tmp_path, tiny_run(world, tmp_path))
    run(script, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    assert_two_steps(tmp_path / "run-trl")
    state = json.loads((tmp_path / "run-trl" / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["train_batch_size"] == 6, "12 completions of a step, 6 of them on each process"


def test_it_goes_on_from_its_last_checkpoint(tmp_path, world, monkeypatch):
    for num_steps, words in ((2, []), (4, ["--resume"])):
        config = parse_config(tiny_run(world, tmp_path, optimization=TINY | {"num_steps": num_steps}))
        monkeypatch.setattr(sys, "argv", ["script.py", *words])
        namespace_of(export_trl(config))["main"]()
    steps = [row["step"] for row in logs_of(tmp_path / "run-trl")]
    assert steps == [1, 2, 3, 4], "in one history, nothing made twice"
    written = json.loads((tmp_path / "run-trl" / "checkpoint-4" / "trainer_state.json").read_text())
    assert written["epoch"] == 1.0


def section_of(kind: str, world: Path, folder: Path, url: str) -> dict[str, Any]:
    local = {"type": "local", "model": str(world / "teacher")}
    sections: dict[str, dict[str, Any]] = {
        "local": local | {"dtype": "bfloat16", "random_weights": True},
        "served": {"type": "served", "urls": [url], "model": "served-teacher"},
        "several": {"type": "several", "teachers": {"a": local, "b": local}, "combine": "mixture"},
        "privileged": {"type": "privileged", "teacher": local, "template": "{answer} + {prompt}"},
        "cached": {"type": "cached", "teacher": local, "directory": str(folder / "cache")},
    }
    return sections[kind]


@pytest.mark.parametrize("kind", ["local", "served", "several", "privileged", "cached"])
def test_each_type_of_teacher_that_trl_admits(tmp_path, world, kind, monkeypatch):
    """In this process, and by the very trainer of the script: the teacher has scored every token of the first step."""
    if kind == "served":
        pytest.importorskip("fastapi", reason="needs rlad[serve]")
    teacher = load_language_model(str(world / "teacher"))
    with (
        server_thread(teacher, served_name="served-teacher", max_context_tokens=256)
        if kind == "served"
        else nullcontext() as client
    ):
        section = section_of(kind, world, tmp_path, client.url if client else "")
        config = {**tiny_run(world, tmp_path), "teacher": section}
        script = script_of(tmp_path, config)
        monkeypatch.setattr(sys, "argv", ["script.py"])
        names = namespace_of(script.read_text())
        assert parse_config(config | {"teacher": names["TEACHER"]}).teacher == parse_config(config).teacher
        names["main"]()
    assert_two_steps(tmp_path / "run-trl")


def test_the_leash_goes_to_the_initial_student(tmp_path, world, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script.py"])
    config = tiny_run(world, tmp_path, optimization=TINY | {"kl_coef": 0.05})
    namespace_of(export_trl(parse_config(config)))["main"]()
    assert_two_steps(tmp_path / "run-trl")
    first, second = (row["reference/kl/mean"] for row in logs_of(tmp_path / "run-trl"))
    assert first == pytest.approx(0, abs=1e-6) and second > 1e-6


# --- it says what the config says -------------------------------------------------------------------------------------


def test_its_arguments_are_the_engine_s(tmp_path, world):
    """All fields that both set; the others are TRL's defaults in both."""
    loop = {"learning_rate": 3e-4, "schedule": "cosine", "warmup_steps": 1, "kl_coef": 0.01, "aggregation": "token_mean"}
    engine = {"type": "trl", "trl": {"log_completions": True}}
    sections = {"rollout": {"temperature": 0.7, "group_size": 6}, "objective": {"type": "kdrl"}, "engine": engine}
    config = parse_config(tiny_run(world, tmp_path, optimization=TINY | loop, **sections))
    names = namespace_of(export_trl(config))
    ours = names["arguments"]()
    with closing(make_task(**config.task.model_dump())) as task:
        theirs = TRLEngine(config, student=load_student(config), task=task).arguments
    only_one_sets = {"output_dir", "logging_dir", "disable_tqdm", "save_strategy", "save_steps", "save_total_limit"}
    only_one_sets |= {"optim", "weight_decay", "adam_beta1", "adam_beta2", "run_name", "ddp_find_unused_parameters"}
    for field in dataclasses.fields(theirs):
        if field.name not in only_one_sets:
            assert getattr(ours, field.name) == getattr(theirs, field.name), field.name
    assert (ours.learning_rate, ours.loss_type, ours.beta, ours.temperature) == (3e-4, "dapo", 0.01, 0.7)
    assert ours.log_completions and ours.objective["type"] == "kdrl"
    assert (ours.adam_beta1, ours.adam_beta2, ours.weight_decay) == (*config.optimization.betas, 0.0)


def test_its_data_are_the_problems_of_the_native_engine_in_its_order(tmp_path, world):
    config = parse_config(tiny_run(world, tmp_path, optimization=TINY | {"num_steps": 6}))
    names = namespace_of(export_trl(config))
    assert names["NUM_PROMPTS"] == 3 * 4 and names["COMPLETIONS_PER_STEP"] == 2 * 6
    ours, theirs = make_task(**names["TASK"]), make_task(**config.task.model_dump())
    for i in range(names["NUM_PROMPTS"]):
        assert ours.problem("train", i, seed=names["SEED"]) == theirs.problem("train", i, seed=config.seed)


@pytest.mark.parametrize("rollout", [{}, {"system_prompt": "2 2", "chat_template_kwargs": {"thinking": False}}])
def test_a_chat_is_given_as_messages(tmp_path, world, monkeypatch, rollout):
    """The student reads the tokens that rlad gives it, and the verifier what the student wrote."""
    student = tmp_path / "student"
    student.mkdir()
    for file in (world / "student").iterdir():
        (student / file.name).write_bytes(file.read_bytes())
    write_tokenizer(student, chat_template=CHAT)
    config = tiny_run(world, tmp_path, student={"model": str(student)}, rollout={"group_size": 6, **rollout})
    names = namespace_of(export_trl(parse_config(config)))
    seen: list[Any] = []
    trainer = names["RLADTrainer"]

    class Watched(trainer):
        def _tokenize_prompts(self, prompts: list[Any]) -> Any:
            seen.append((prompts, super()._tokenize_prompts(prompts)[0]))
            return super()._tokenize_prompts(prompts)

    names["RLADTrainer"] = Watched
    monkeypatch.setattr(sys, "argv", ["script.py"])
    names["main"]()
    tokenizer = load_student(parse_config(config)).tokenizer
    (prompts, ids), *_ = seen
    assert [message["role"] for message in prompts[0]] == (["system", "user"] if rollout else ["user"])
    assert ids == [prompt_token_ids(tokenizer, messages[-1]["content"], RolloutConfig(**rollout)) for messages in prompts]
    content = tokenizer(prompts[0][-1]["content"])["input_ids"]
    assert ids[0] == ([4, 4, *content, 2, 6] if rollout else [*content, 6]), "what the template adds"


NOT_IN_THE_SCRIPT = ("evaluation.num_", "evaluation.ood_task", "evaluation.temperature")
"""`rlad evaluate` measures what the script trains."""
REFUSED = ("student.lora", "student.end_tokens", "engine.type", "rollout.system_prompt", "rollout.chat_template_kwargs")
"""The last two by these students, which have no chat template."""
OTHER: dict[str, Any] = {
    "student.dtype": "bfloat16",
    "student.device": "cuda:1",
    "student.lora": LoraConfig(),
    "teacher.dtype": "bfloat16",
    "teacher.device": "cpu",
    "teacher.keep": "cpu",
    "teacher.quantization": "int8",
    "rollout.prompt_format": "plain",
    "optimization.schedule": "linear",
    "optimization.betas": (0.5, 0.6),
    "optimization.aggregation": "token_mean",
    "optimization.advantage_scale": "none",
    "optimization.max_missing_teacher_share": 0.5,
    "optimization.steps_per_rollout_batch": 1,
    "optimization.tokens_per_batch": 20,
    "evaluation.every_steps": 4,
    "rollout.prompts_per_batch": 8,
}


def test_no_setting_is_lost_silently(tmp_path, world):
    """Each setting changes the script when it changes, is refused, or belongs to the evaluation."""
    config = parse_config(tiny_run(world, tmp_path, teacher={"type": "local"}))
    base, lost = export_trl(config), []
    for section in ("student", "teacher", "objective", "rollout", "optimization", "evaluation"):
        for name, value in getattr(config, section).model_dump().items():
            key = f"{section}.{name}"
            if name in ("type", "model") or key in REFUSED or key.startswith(NOT_IN_THE_SCRIPT):
                continue
            part = getattr(config, section).model_copy(update={name: OTHER[key] if key in OTHER else other(value)})
            if export_trl(config.model_copy(update={section: part})) == base:
                lost.append(key)
    assert lost == []
    assert export_trl(config.model_copy(update={"seed": 4})) != base
    assert export_trl(config.model_copy(update={"run_dir": "elsewhere"})) != base


def other(value: Any) -> Any:
    """Another value of a setting, of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return {"token": "sequence", "off": 2.0}[value]
    return 9 if value is None else value * 2 + 1 if isinstance(value, int) else value / 2 + 1e-3


def test_what_the_script_does_otherwise_stands_in_it(tmp_path, world):
    loop = {"max_teacher_tokens": 1000, "weight_decay": 0.1}
    text = export_trl(parse_config(tiny_run(world, tmp_path, optimization=TINY | loop)))
    assert "# - optimization.max_teacher_tokens = 1000 is not carried over: TRL has no such limit." in text
    assert "# - transformers does not decay the weights of norms and biases, rlad decays all." in text
    assert "# - TRL chooses which completions of a rollout batch share an optimiser step." in text
    assert "weight_decay=0.1," in text


def test_without_a_teacher_there_is_none_in_the_script(tmp_path, world):
    text = export_trl(parse_config({**tiny_run(world, tmp_path), "objective": {"type": "grpo"}}))
    assert "TEACHER" not in text and "prepare_teacher" not in text and "teacher=" not in text
    compile(text, "script.py", "exec")


def test_values_become_python_text():
    value = {"a": 'it"s\n', "b": [1, 2.5], "c": None, "d": {"e": "x" * 120}, "f": True}
    assert eval(literal(value)) == value and literal(value).count("\n") > 4
    assert literal({"a": 1}) == '{"a": 1}'


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["objective=topd"], "objective 'topd' is not for engine.type = 'trl'; use engine.type = 'native'"),
        (["objective=sft"], "objective 'sft' is not for engine.type = 'trl'"),
        (["objective=kdrl", "objective.masking=group"], "objective.masking = 'group' needs verdicts, and TRL has"),
        (["optimization.kl_coef={start=0.1,end=0.0,change_per_step=-0.1}"], "optimization.kl_coef must be one number"),
        (["student.lora={rank=2}"], "[student.lora] is not exported to a script; pass peft_config"),
        (
            ["engine.type=trl", "engine.trl.teacher_is_sharded=true"],
            "engine.trl.teacher_is_sharded is not exported to a script",
        ),
        (["teacher={type='ema'}"], "a teacher of type 'ema' moves with the student"),
        (["teacher={type='cached',teacher={type='adapter'}}"], "a teacher of type 'adapter' stands on the base model of a"),
        (["engine.type=trl", "engine.trl={learning_rate=1.0}"], "engine.trl.learning_rate is decided by the rest of the run's"),
        (["rollout.max_prompt_tokens=5"], "tokens, but at most 5 are allowed (rollout.max_prompt_tokens)"),
    ],
)
def test_what_trl_cannot_train_is_refused(tmp_path, arguments, sentence):
    assert sentence in rlad_fails("export", "trl", *arguments, "--output", tmp_path / "script.py")
    assert not (tmp_path / "script.py").exists()


def test_a_file_that_is_there_is_left_alone(tmp_path):
    (tmp_path / "mine.py").write_text("mine")
    assert "exists already" in rlad_fails("export", "trl", "--output", tmp_path / "mine.py")
    assert (tmp_path / "mine.py").read_text() == "mine"


def test_processes_that_cannot_share_a_step_are_refused(tmp_path, world, monkeypatch):
    names = namespace_of(export_trl(parse_config(tiny_run(world, tmp_path))))
    monkeypatch.setenv("WORLD_SIZE", "5")
    with pytest.raises(SystemExit, match="12 completions of a step cannot be shared equally by 5 processes"):
        names["arguments"]()


def test_the_embedded_run_can_be_exported():
    config: RunConfig = load_config()
    names = namespace_of(export_trl(config))
    assert names["STUDENT"]["model"] == "embedded/student" and names["TEACHER"]["model"] == "embedded/teacher"
