"""`rlad export verl`: what is in the folder, what the command says, what is refused. Needs no
verl."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from rlad.config.file import load_config, parse_config
from rlad.config.rollout import CorrectionConfig, VLLMConfig
from rlad.config.run import LoraConfig, RunConfig
from rlad.engines.verl import check as verl_check
from rlad.engines.verl.objective import (
    VARIABLE,
    objective_json,
    objective_knobs_from_environment,
)
from rlad.engines.verl.reward import compute_score
from rlad.export.verl import export_verl
from rlad.export.verl_command import Cluster, overrides, require_exportable, without_equivalent
from rlad.tasks import make_task
from tiny_runs import rlad_fails, run_config, write_config, write_tokenizer, write_world
from verl_exports import SMALL, export, overrides_of

NEEDS_PARQUET = pytest.mark.datasets
ONE_GPU = Cluster(gpus_per_node=1, teacher_gpus_per_node=1)


def rows_of(command: Path, split: str) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    return pq.read_table(command.with_name(f"{split}.parquet")).to_pylist()


@NEEDS_PARQUET
def test_the_data_are_the_problems_of_the_native_engine_in_its_order(tmp_path):
    command = export(tmp_path / "out", *SMALL, "seed=5")
    config = load_config(command.with_name("config.toml"))
    task = make_task(**config.task.model_dump())
    train = rows_of(command, "train")
    assert [row["prompt"] for row in train] == [
        [{"role": "user", "content": task.problem("train", i, seed=5).prompt}] for i in range(3 * 4)
    ]
    held_out = rows_of(command, "validation")
    assert [row["reward_model"]["ground_truth"] for row in held_out] == [
        task.problem("validation", i).answer for i in range(3)
    ]
    assert config == load_config(None, [*SMALL, "seed=5"])


@NEEDS_PARQUET
def test_a_conversation_keeps_its_messages_and_the_templates_variables(tmp_path):
    pytest.importorskip("pyarrow", reason="verl reads Parquet files: pip install 'rlad[datasets]'")
    world = write_world(tmp_path)
    chat = (
        "{% for m in messages %}{{ m.content }} {% endfor %}"
        "{% if thinking is defined %}0 {% endif %}="
    )
    write_tokenizer(world / "student", chat_template=chat)
    messages = [
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "0 ="},
    ]
    (world / "path.jsonl").write_text(json.dumps({"prompt": messages, "answer": "1"}) + "\n")
    rollout = {"system_prompt": "2 2", "chat_template_kwargs": {"thinking": False}}
    config = parse_config(run_config(world, tmp_path / "run", rollout=rollout))
    command = export_verl(config, tmp_path / "out", ONE_GPU)
    assert rows_of(command, "train")[0]["prompt"] == [
        {"role": "system", "content": "2 2"},
        *messages,
    ]
    given = dict(argument.split("=", 1) for argument in overrides_of(command))
    assert given["+data.apply_chat_template_kwargs.thinking"] == "false"
    assert given["data.max_prompt_length"] == "8", "2 2 1 2 0 = and the template's 0 ="


@NEEDS_PARQUET
def test_the_command_says_what_the_config_says(tmp_path):
    command = export(
        tmp_path / "it's here",
        *SMALL,
        "objective.alpha=0.25",
        "optimization.steps_per_rollout_batch=2",
    )
    given = dict(argument.split("=", 1) for argument in overrides_of(command, "trainer.nnodes=7"))
    assert (
        given["data.train_batch_size"] == "4"
        and given["actor_rollout_ref.actor.ppo_mini_batch_size"] == "2"
    )
    assert given["trainer.total_training_steps"] == "2", "3 steps, 2 on each rollout batch"
    assert given["trainer.nnodes"] == "7", "what follows the script's name wins"
    assert (
        json.loads(json.loads(given[f"+ray_kwargs.ray_init.runtime_env.env_vars.{VARIABLE}"]))[
            "alpha"
        ]
        == 0.25
    )
    assert given["distillation.distillation_loss.loss_mode"] == '"trrd"'
    text = command.read_text()
    assert "optimization.num_steps = 3 is rounded up to whole rollout batches." in text
    assert all(
        note in text for note in without_equivalent(load_config(command.with_name("config.toml")))
    )


@pytest.mark.parametrize(
    ("changes", "key", "value"),
    [
        (
            "optimization.aggregation=token_mean",
            "actor_rollout_ref.actor.loss_agg_mode",
            "token-mean",
        ),
        (
            "optimization.aggregation=constant_length",
            "actor_rollout_ref.actor.loss_scale_factor",
            320,
        ),
        ("optimization.kl_coef=0.01", "actor_rollout_ref.actor.kl_loss_coef", 0.01),
        ("optimization.advantage_scale=none", "algorithm.norm_adv_by_std_in_grpo", False),
        ("optimization.learning_rate=1e-6", "actor_rollout_ref.actor.optim.lr", 1e-6),
        ("optimization.max_grad_norm=0.5", "actor_rollout_ref.actor.optim.clip_grad", 0.5),
        ("evaluation.temperature=0.0", "actor_rollout_ref.rollout.val_kwargs.do_sample", False),
        ("objective=grpo", "distillation.enabled", False),
        ("objective=opd", "distillation.distillation_loss.loss_mode", "opd"),
        ("student.dtype=bfloat16", "actor_rollout_ref.rollout.dtype", "bfloat16"),
    ],
)
def test_each_setting_reaches_its_place(changes, key, value):
    config = load_config(None, [changes])
    assert overrides(config, ONE_GPU, prompt_tokens=9, chat_template=None)[key] == value


CARRIED_OVER = {
    "seed",
    "run_dir",
    "student.model",
    "student.dtype",
    "student.gradient_checkpointing",
    "teacher.model",
    "teacher.dtype",
    "optimization.steps_per_rollout_batch",
    "optimization.num_steps",
    "rollout.prompt_format",
    "rollout.max_prompt_tokens",
    "rollout.system_prompt",
    "evaluation.num_validation_problems",
    "evaluation.every_steps",
}
"""Settings whose effect is not one number of an override: data, derived counts, formats."""
EXPLAINED = (
    "device",
    "tokens_per_batch",
    "max_seconds",
    "max_teacher_tokens",
    "max_batch_rows",
    "max_missing_teacher_share",
)
REFUSED = (
    "teacher.type",
    "teacher.quantization",
    "teacher.random_weights",
    "objective.type",
    "optimization.schedule",
    # Of pictures and of episodes, which are refused.
    "student.train_vision",
    "rollout.rewritten_turns",
)
TEST_PROBLEMS = ("evaluation.num_test", "evaluation.num_ood", "evaluation.ood_task")


def test_no_setting_is_lost_silently():
    """Each setting changes an override, a note or the data when it changes, or is refused."""
    config = load_config()
    base = (
        overrides(config, ONE_GPU, prompt_tokens=9, chat_template=None),
        without_equivalent(config),
    )
    lost = []
    for section in ("student", "teacher", "rollout", "optimization", "evaluation"):
        for name, value in getattr(config, section).model_dump().items():
            key = f"{section}.{name}"
            if key in CARRIED_OVER or key in REFUSED or key.startswith(TEST_PROBLEMS):
                continue
            changed = other(value, name)
            part = getattr(config, section).model_copy(update={name: changed})
            new = config.model_copy(update={section: part})
            after = (
                overrides(new, ONE_GPU, prompt_tokens=9, chat_template=None),
                without_equivalent(new),
            )
            if after == base and not is_refused(new):
                lost.append(key)
    assert lost == []


def other(value: Any, name: str) -> Any:
    """Another value of a setting, of the same kind."""
    special = {
        "device": "cpu",
        "keep": "cpu",
        "aggregation": "token_mean",
        "advantage_scale": "none",
        "betas": (0.5, 0.6),
    }
    special |= {
        "lora": LoraConfig(),
        "chat_template_kwargs": {"enable_thinking": False},
        "end_tokens": ("<eos>",),
        "engine": "auto",
        "vllm": VLLMConfig(max_num_seqs=7),
        "correction": CorrectionConfig(clip_max=7.0),
    }
    if name in special:
        return special[name]
    if isinstance(value, bool):
        return not value
    return 100_000 if value is None else value * 2 + 1


def is_refused(config: RunConfig) -> bool:
    try:
        require_exportable(config, ONE_GPU)
    except ValueError:
        return True
    return False


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["objective=topd"], "objective 'topd' is not available on verl; use one of trrd, grpo"),
        (["objective=opd_then_grpo"], "objective 'opd_then_grpo' is not available on verl"),
        (
            ["objective=rlsd"],
            "an annealed objective.teacher_weight is not available on verl; give one number.",
        ),
        (
            ["objective=kdrl", "objective.teacher_on=wrong"],
            "objective.teacher_on = 'wrong' is not available on verl; set it to 'all'",
        ),
        (
            ["rollout.temperature=0.7"],
            "set it to 1, at which verl's teacher always scores",
        ),
        (
            ["optimization.schedule=linear"],
            "optimization.schedule = 'linear' is not available on verl",
        ),
        (
            ["optimization.kl_coef={start=0.1,end=0.0,change_per_step=-0.1}"],
            "an annealed optimization.kl_coef is not available on verl",
        ),
        (
            [
                "rollout.engine=vllm",
                'rollout.vllm.urls=["http://127.0.0.1:8000"]',
                "rollout.max_staleness=1",
            ],
            "rollout.max_staleness = 1 is not available on verl; set it to 0.",
        ),
        (
            ["teacher.quantization=int8"],
            "this [teacher] is not available on verl; name a model of type 'local'",
        ),
        (
            ["objective=grpo", "objective.ratio_level=sequence"],
            "objective.ratio_level = 'sequence' of grpo is not available on verl",
        ),
        (
            ["--gpus-per-node", "3"],
            "an optimiser step holds 128 completions, which 3 GPUs cannot share equally",
        ),
        (
            ["rollout.max_prompt_tokens=5"],
            "but at most 5 are allowed (rollout.max_prompt_tokens); shorten the prompts or change",
        ),
    ],
)
def test_what_verl_would_train_differently_is_refused(tmp_path, arguments, sentence):
    assert sentence in rlad_fails("export", "verl", *arguments, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_pyarrow_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    sentence = rlad_fails(
        "export", "verl", *SMALL, "--gpus-per-node", "1", "--output", tmp_path / "out"
    )
    assert "pip install 'rlad[datasets]'" in sentence and not (tmp_path / "out").exists()


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    (tmp_path / "mine").write_text("mine")
    assert "is there already and not empty; choose another --output." in rlad_fails(
        "export", "verl", "--output", tmp_path
    )
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@NEEDS_PARQUET
def test_files_of_the_task_are_found_from_everywhere(tmp_path, world, monkeypatch):
    monkeypatch.chdir(world)
    table = run_config(world, tmp_path / "run")
    table["task"] |= {name: f"{name}.jsonl" for name in ("path", "validation_path", "test_path")}
    command = export(tmp_path / "out", str(write_config(tmp_path / "run.toml", table)))
    monkeypatch.chdir(tmp_path)
    task: Any = load_config(command.with_name("config.toml")).task
    assert [task.path, task.validation_path, task.test_path] == [
        str(world / f"{name}.jsonl") for name in ("path", "validation_path", "test_path")
    ]
    train = rows_of(command, "train")
    assert len(train) == 4 * 4, "a finite task starts again"


# --- reward ---------------------------------------------------------------------------------------


def judge(command: Path, row: dict[str, Any], completion: str, **changed: Any) -> dict[str, float]:
    truth = row["reward_model"]["ground_truth"]
    fields = {
        "data_source": row["data_source"],
        "ground_truth": truth,
        "extra_info": row["extra_info"],
    } | changed
    return compute_score(
        solution_str=completion, config=str(command.with_name("config.toml")), **fields
    )


@NEEDS_PARQUET
def test_the_reward_is_the_task_s(tmp_path):
    command = export(tmp_path / "out", *SMALL)
    rows = rows_of(command, "train")
    for row in rows:
        right = f"I think. Answer: {row['reward_model']['ground_truth']}."
        wrong = right.replace("knight", "?").replace("knave", "knight").replace("?", "knave")
        assert judge(command, row, right) == {"score": 1.0, "acc": 1.0}
        assert judge(command, row, wrong) == {"score": 0.0, "acc": 0.0}
    with pytest.raises(
        ValueError,
        match="has another answer than in verl's data: the task has changed since the export",
    ):
        judge(command, rows[0], "", ground_truth="nobody")


@NEEDS_PARQUET
def test_what_cannot_be_judged_has_no_reward(tmp_path, world):
    table = run_config(world, tmp_path / "run")
    table["task"] |= {"verifier": "user_verifiers:by_completion"}
    command = export(tmp_path / "out", str(write_config(tmp_path / "run.toml", table)))
    row = rows_of(command, "train")[0]
    with pytest.raises(
        ValueError, match=r"the verifier of .* cannot judge a completion .*; it is left out"
    ):
        judge(command, row, "nan")


# --- RLAD_OBJECTIVE and the check -----------------------------------------------------------------


def test_the_knobs_travel_as_json(monkeypatch):
    config = parse_config(
        load_config(
            None, ["objective.teacher_log_ratio_clip=off", "objective.alpha=0.25"]
        ).model_dump()
    )
    monkeypatch.setenv(VARIABLE, objective_json(config.objective))
    assert objective_knobs_from_environment("trrd") == {
        "alpha": 0.25,
        "teacher_log_ratio_clip": None,
        "clip_low": 0.2,
        "clip_high": 0.28,
        "ratio_level": "token",
        "dual_clip": None,
        "evidence_weight": 0.0,
        "weight_clip": 0.2,
        "contrast_clip": 2.0,
    }


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (
            None,
            "start verl with the command of `rlad export verl`, or add +ray_kwargs.ray_init",
        ),
        ("{", "the environment variable RLAD_OBJECTIVE of this process is not JSON"),
        (
            '{"type": "opd"}',
            "RLAD_OBJECTIVE describes objective 'opd' but distillation.distillation_loss.loss_mode "
            "is 'trrd'",
        ),
        (
            '{"type": "trrd", "alhpa": 1}',
            "objective.alhpa is an unknown key: did you mean 'alpha'?",
        ),
        (
            '{"type": "trrd", "alpha": {"start": 1, "end": 0, "change_per_step": -0.1}}',
            "an annealed objective.alpha is not available on verl",
        ),
    ],
)
def test_a_variable_that_says_nothing_is_refused(monkeypatch, value, sentence):
    monkeypatch.delenv(VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(VARIABLE, value)
    with pytest.raises(ValueError) as caught:
        objective_knobs_from_environment("trrd")
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        ("0.8.0", "verl 0.8.0 is installed, but"),
        ("0.10.1", "verl 0.10.1 is installed, but"),
        ("0.9.2", None),
    ],
)
def test_other_versions_of_verl_are_refused(monkeypatch, found, sentence):
    monkeypatch.setattr(verl_check, "version", lambda name: found)
    problem = verl_check.verl_version_problem()
    assert (
        problem is None
        if sentence is None
        else problem is not None and problem.startswith(sentence)
    )
