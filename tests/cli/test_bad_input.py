"""What a user can do wrong: one clear sentence, exit code 2 (1 where a run could not go on), and
nothing written is lost."""

import json
import multiprocessing
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

import rlad
from rlad.cli.main import main
from rlad.runs.directory import RunDirectory
from tiny_runs import (
    OFTEN_CORRECT,
    WORDS,
    remains,
    rlad_fails,
    run_config,
    write_config,
    write_model,
    write_tokenizer,
    write_unreachable_answers,
)


@pytest.fixture
def toml(world: Path, tmp_path: Path) -> Path:
    return write_config(tmp_path / "run.toml", run_config(world, tmp_path / "run"))


# --- the config -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        (
            "optimization.num_step=3",
            "optimization.num_step is an unknown key: did you mean 'num_steps'?",
        ),
        (
            "optimisation.num_steps=3",
            "optimisation is an unknown key: did you mean 'optimization'?",
        ),
        (
            "rollout.foo=3",
            "rollout.foo is an unknown key: valid keys there are chat_template_kwargs, ",
        ),
        (
            "optimization.num_steps=many",
            "optimization.num_steps is 'many': it must be a valid integer.",
        ),
        (
            "optimization.num_steps=2.5",
            "optimization.num_steps is 2.5: it must be a valid integer.",
        ),
        (
            "optimization.learning_rate=nan",
            "optimization.learning_rate is nan: it must be a finite number.",
        ),
        (
            "optimization.learning_rate=3",
            "optimization.learning_rate is 3: it must be less than or equal to 1.",
        ),
        ("task=sudoku", "task.type is 'sudoku': it must be one of knights_and_knaves, arithmetic"),
        ("objective=trdd", "did you mean 'trrd'?"),
        ("rollout.group_size=1", "rollout.group_size is 1: it must be greater than or equal to 2."),
        ("objective.alpha=1.5", "objective.alpha is 1.5: it must be less than or equal to 1."),
        ("objective.alpha=-0.1", "objective.alpha is -0.1: it must be greater than or equal to 0."),
        (
            "objective.alpha={start=1.2,end=0.5,change_per_step=-0.1}",
            "objective.alpha.start is 1.2: it must be less than or equal to 1.",
        ),
        (
            "optimization.steps_per_rollout_batch=3",
            "is not a multiple of optimization.steps_per_rollout_batch = 3",
        ),
        ("num_steps=3", "num_steps is an unknown key: did you mean 'optimization.num_steps'?"),
        ("lr=1e-5", "lr is an unknown key: did you mean 'optimization.learning_rate'?"),
        ("optimization.lr=1e-5", "did you mean 'learning_rate'?"),
        ("teacher.adapter=x", "teacher.adapter is an unknown key: it belongs to teacher.type"),
        ("student=x", "student is 'x': it must be a section, with keys of its own."),
        ("run_dir=", "run_dir is '': it must have at least 1 character."),
        (f"run_dir={'x' * 260}", "is longer than the 255 bytes that a file's name may have"),
        ("optimization.warmup_steps=4", "leaves none of the 4 steps at the full learning rate"),
        ("=3", "override '=3' is not of the form key.path=value"),
        ("seed.x=3", "seed is {'x': 3}: it must be a valid integer."),
    ],
)
def test_config(toml, tmp_path, override, sentence):
    extra = (
        ["seed=0"]
        if override.startswith("seed.")
        else ["objective=trrd"]
        if override.startswith("objective.")
        else []
    )
    assert sentence in rlad_fails("train", toml, *extra, override)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "cannot be read (No such file or directory)"),
        (b"[student\nmodel=", "is not valid TOML"),
        (b"\xff\xfe", "TOML"),
    ],
)
def test_config_file(tmp_path, content, sentence):
    if content is not None:
        (tmp_path / "run.toml").write_bytes(content)
    assert sentence in rlad_fails("train", tmp_path / "run.toml")


def test_two_configs(toml):
    assert "got 2 configs" in rlad_fails("train", toml, "num_steps")


# --- models, task, prompts: refused before anything is written, by `train` and by `check` ---------


@pytest.fixture(scope="module")
def bad(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model folders and problem files that cannot be used."""
    folder = tmp_path_factory.mktemp("bad")
    shutil.copytree(
        world / "student", folder / "no_tokenizer", ignore=shutil.ignore_patterns("tokenizer*")
    )
    shutil.copytree(
        world / "student", folder / "no_weights", ignore=shutil.ignore_patterns("*.safetensors")
    )
    shutil.copytree(world / "student", folder / "no_end")
    write_tokenizer(folder / "no_end", eos_token=None)
    for name in ("config.json", "generation_config.json"):
        table = json.loads((folder / "no_end" / name).read_text())
        (folder / "no_end" / name).write_text(json.dumps(table | {"eos_token_id": None}))
    own = (folder / "no_end" / "generation_config.json").read_text()
    whole = json.dumps(json.loads(own) | {"eos_token_id": [1, 2]})
    for name, text in {
        "end_beyond": whole.replace("[1, 2]", "[1, 99999]"),
        "cut_generation_config": whole[:-20],
    }.items():
        shutil.copytree(world / "student", folder / name)
        (folder / name / "generation_config.json").write_text(text)
    for name, setting in {
        "flash": {"_attn_implementation": "flash_attention_2"},
        "gptq": {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}},
    }.items():
        shutil.copytree(world / "student", folder / name)
        config = json.loads((folder / name / "config.json").read_text())
        (folder / name / "config.json").write_text(json.dumps(config | setting))
    write_model(folder / "other_strings", seed=2, words=(*WORDS[:4], "9", *WORDS[5:]))
    write_model(folder / "short_context", seed=2, max_position_embeddings=16)
    write_model(folder / "small", seed=2, vocab_size=5)
    (folder / "empty.jsonl").write_text("\n")
    (folder / "long.jsonl").write_text(json.dumps({"prompt": "1 + " * 200 + "1 =", "answer": "0"}))
    return folder


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("student.model", "{bad}/nothing", "nothing' cannot be found or read"),
        ("student.model", "no-such/model", "'no-such/model' cannot be found or read"),
        (
            "student.model",
            "embedded/studnt",
            "the embedded models are embedded/student, embedded/teacher",
        ),
        (
            "student.model",
            "{bad}/no_tokenizer",
            "save the tokenizer beside the model with `tokenizer.save_pretrained(folder)`",
        ),
        ("student.model", "{bad}/no_weights", "no_weights'"),
        (
            "student.model",
            "{bad}/no_end",
            "declares no end token; correct eos_token_id in its generation_config.json",
        ),
        (
            "student.model",
            "{bad}/end_beyond",
            "declares end token 99999, above its",
        ),
        (
            "student.model",
            "{bad}/cut_generation_config",
            "generation_config.json of '{bad}/cut_generation_config' cannot be read",
        ),
        ("student.model", "{bad}/flash", "asks for a package that is not installed"),
        ("student.model", "{bad}/gptq", "asks for a package that is not installed"),
        ("teacher.model", "{bad}/no_tokenizer", "save the tokenizer beside the model"),
        (
            "teacher.model",
            "{bad}/other_strings",
            "1 of 7 token ids differ, the first is id 4, '2' for the student and '9'",
        ),
        ("teacher.model", "{bad}/short_context", "set rollout.max_prompt_tokens to at most 12"),
        ("task.path", "{bad}/empty.jsonl", "none of its problems is for the split train"),
        ("task.path", "{bad}/nothing.jsonl", "No such file or directory"),
        (
            "task.path",
            "{bad}/long.jsonl",
            "the prompt of train problem 0 has 402 tokens, but at most 252 are allowed",
        ),
        (
            "task.test_path",
            "{bad}/long.jsonl",
            "the prompt of test problem 0 has 402 tokens, but at most 252 are allowed",
        ),
        ("task.verifier", "exat", "did you mean 'exact'?"),
        ("task.verifier", "run_verifiers:nothing", "has no attribute 'nothing'"),
        ("rollout.prompt_format", "chat", "has no chat template; use 'plain' or 'auto'"),
        ("rollout.max_completion_tokens", "300", "at most 0 are allowed (context of 256 minus"),
        ("student.device", "tpu9", "device 'tpu9' cannot be used on this machine"),
    ],
)
def test_what_cannot_be_trained(toml, tmp_path, bad, key, value, sentence):
    override = f"{key}={value.format(bad=bad)}"
    sentence = sentence.format(bad=bad)
    assert sentence in rlad_fails("train", toml, override)
    assert not (tmp_path / "run").exists(), "a mistake leaves no run directory behind"
    checked = CliRunner().invoke(main, ["check", str(toml), override])
    assert (
        checked.exit_code == 2
        and sentence in checked.stdout
        and "this cannot work" in checked.stdout
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("who", ["student", "teacher"])
def test_gpu_where_there_is_none(toml, who):
    assert "device 'cuda' cannot be used on this machine" in rlad_fails(
        "train", toml, f"{who}.device=cuda"
    )


def test_tokenizer_of_another_model(world, toml, bad):
    assert "has 7 tokens but the model only 5 embeddings" in rlad_fails(
        "train", toml, f"student.model={bad / 'small'}"
    )


def test_incomplete_weights(world, toml, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(world / "student")
    state = {name: tensor for name, tensor in model.state_dict().items() if "lm_head" not in name}
    shutil.copytree(world / "student", tmp_path / "headless")
    model.save_pretrained(tmp_path / "headless", state_dict=state)
    sentence = rlad_fails("train", toml, f"student.model={tmp_path / 'headless'}")
    assert "it lacks 1 tensors, the first is 'lm_head.weight'" in sentence


def test_student_with_nan_weights(world, toml, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(world / "student")
    torch.nn.init.constant_(model.lm_head.weight, torch.nan)
    shutil.copytree(world / "student", tmp_path / "nan")
    model.save_pretrained(tmp_path / "nan")
    assert "weight 'lm_head.weight' holds NaN" in rlad_fails(
        "train", toml, f"student.model={tmp_path / 'nan'}"
    )


def test_padded_vocabularies_are_accepted(world, tmp_path):
    """The student samples ids that the teacher has no row for: dropped and counted, from there to
    the end of the completion."""
    student = write_model(tmp_path / "student", seed=1, vocab_size=12)
    config = run_config(
        world,
        tmp_path / "run",
        student={"model": str(student)},
        objective={"type": "opd"},
        optimization={"max_missing_teacher_share": 0.9},
    )
    result = rlad.train(config)
    rows = list(RunDirectory(result.run_dir).read("metrics.jsonl"))
    assert sum(row["objective/dropped_tokens/count"] for row in rows) > 0
    assert sum(row["objective/trained_tokens/count"] for row in rows) > 0


# --- rewards and teachers that fail ---------------------------------------------------------------


def test_nan_rewards_are_counted_and_the_run_goes_on(world, tmp_path):
    task = {"verifier": "run_verifiers:nan_for_long"}
    result = rlad.train(run_config(world, tmp_path / "run", task=task))
    shares = [
        row["reward/cannot_judge/frac"]
        for row in RunDirectory(result.run_dir).read("metrics.jsonl")
    ]
    assert len(shares) == 4 and 0 < sum(shares) / 4 < 1
    samples = [
        r for row in RunDirectory(result.run_dir).read("samples.jsonl") for r in row["rollouts"]
    ]
    assert all((r["verdict"] == "cannot_judge") == (len(r["text"].split()) > 2) for r in samples)


def test_nothing_can_be_judged(world, tmp_path):
    """No gradient, and no failure: the weights stay what they are."""
    task = {
        "verifier": "run_verifiers:only_the_reference",
        "path": write_unreachable_answers(tmp_path),
    }
    result = rlad.train(run_config(world, tmp_path / "run", task=task))
    run = RunDirectory(result.run_dir)
    assert [row["reward/cannot_judge/frac"] for row in run.read("metrics.jsonl")] == [1.0] * 4
    weights = [
        AutoModelForCausalLM.from_pretrained(path).state_dict()
        for path in (world / "student", run.checkpoint(4))
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_verifier_that_cannot_judge_the_reference_answers(toml, tmp_path):
    sentence = rlad_fails("train", toml, "task.verifier=run_verifiers:always_nan")
    assert "cannot judge the reference answers of the first 5 training problems" in sentence
    assert not (tmp_path / "run").exists()


def test_a_mistake_leaves_no_verifier_process_behind(toml):
    rlad_fails("train", toml, "task.verifier=run_verifiers:nan_for_long", "teacher.model=/nowhere")
    assert multiprocessing.active_children() == []


def broken_teacher(folder: Path, weight: str, value: float, row: int | None = None) -> str:
    """A teacher of the family phi, whose head has a bias, with one weight (or one row of it) set to
    `value`."""
    write_model(folder, seed=2, family="phi")
    model = AutoModelForCausalLM.from_pretrained(folder)
    parameter = model.get_parameter(weight).data
    (parameter if row is None else parameter[row]).fill_(value)
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("weight", "value", "row"),
    [("lm_head.bias", torch.inf, 0), ("lm_head.weight", torch.nan, None)],
)
def test_teacher_that_gives_nothing(world, toml, tmp_path, weight, value, row):
    """Its log-probs are all -inf (all its mass is on <pad>, which is then NaN), or all NaN."""
    teacher = broken_teacher(tmp_path / "teacher", weight, value, row)
    often = f"task.verifier={OFTEN_CORRECT['verifier']}"
    sentence = rlad_fails("train", toml, f"teacher.model={teacher}", often, code=1)
    assert re.search(
        r"step \d: the teacher gave no finite log-prob for 100.0% of the tokens", sentence
    )
    ((step, folder), *_) = RunDirectory(tmp_path / "run").checkpoints()
    assert step == 0
    AutoModelForCausalLM.from_pretrained(folder)


def test_teacher_that_gives_some(world, tmp_path):
    """A teacher that is NaN after every '2': those tokens are dropped and counted, the others
    train."""
    teacher = broken_teacher(
        tmp_path / "teacher", "model.embed_tokens.weight", torch.nan, WORDS.index("2")
    )
    optimization = {"max_missing_teacher_share": 0.9}
    result = rlad.train(
        run_config(
            world,
            tmp_path / "run",
            teacher={"model": teacher},
            optimization=optimization,
            task=OFTEN_CORRECT,
        )
    )
    rows = list(RunDirectory(result.run_dir).read("metrics.jsonl"))
    assert sum(row["objective/dropped_tokens/count"] for row in rows) > 0
    assert sum(row["objective/trained_tokens/count"] for row in rows) > 0


# --- run directories ------------------------------------------------------------------------------


@pytest.fixture
def finished(world: Path, toml: Path, tmp_path: Path) -> Path:
    rlad.train(rlad.load_config(toml))
    return tmp_path / "run"


def test_existing_run_is_kept(toml, finished):
    before = remains(finished)
    sentence = rlad_fails("train", toml)
    assert "exists already; use --resume to continue it, --overwrite to delete it" in sentence
    assert remains(finished) == before


def test_overwrite_deletes_only_after_all_is_found_good(toml, finished):
    before = remains(finished)
    rlad_fails("train", toml, "--overwrite", "teacher.model=/nowhere")
    assert remains(finished) == before
    assert (
        CliRunner().invoke(main, ["train", str(toml), "--overwrite", "seed=1", "--json"]).exit_code
        == 0
    )
    assert remains(finished) != before


def test_overwrite_spares_what_is_no_run(toml, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    assert "exists and is not a run directory" in rlad_fails("train", toml, "--overwrite")
    assert (tmp_path / "run" / "thesis.tex").read_text() == "years of work"


def test_resume_without_a_run(toml):
    assert "there is no run in" in rlad_fails("train", toml, "--resume")


def test_resume_and_overwrite(toml):
    assert "give one of the two" in rlad_fails("train", toml, "--resume", "--overwrite")


def test_resume_with_another_config(toml, finished):
    before = remains(finished)
    assert f"resume it by `rlad train {finished} --resume`" in rlad_fails(
        "train", toml, "--resume", "seed=5"
    )
    assert remains(finished) == before


def test_checkpoint_of_another_run(world, toml, finished, tmp_path):
    other = rlad.train(run_config(world, tmp_path / "other", seed=1)).run_dir
    shutil.rmtree(finished / "checkpoints")
    shutil.copytree(other / "checkpoints", finished / "checkpoints")
    assert "it belongs to another run" in rlad_fails("train", toml, "--resume")
    assert len((finished / "metrics.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "trainer/state.json",
        "trainer/optimizer.safetensors",
    ],
)
def test_no_checkpoint_that_is_whole(toml, finished, name):
    for _, folder in RunDirectory(finished).checkpoints():
        os.truncate(folder / name, (folder / name).stat().st_size // 2)
    for arguments in (["train", toml, "--resume"], ["evaluate", finished], ["sample", toml]):
        assert f"{finished} holds no checkpoint that is whole (step-00000" in rlad_fails(*arguments)
    assert f"is damaged ({name} has" in rlad_fails("evaluate", folder)
    assert len((finished / "metrics.jsonl").read_text().splitlines()) == 4


def test_lost_checkpoints(toml, finished):
    shutil.rmtree(finished / "checkpoints")
    assert "has lost its checkpoints; put a copy of one back" in rlad_fails(
        "train", toml, "--resume"
    )
    assert len((finished / "metrics.jsonl").read_text().splitlines()) == 4


def test_missing_test_before_training(toml, finished):
    (finished / "eval.jsonl").unlink()
    assert "eval.jsonl has lost the test before training" in rlad_fails("train", toml, "--resume")


def test_run_directory_that_cannot_be_made(toml, tmp_path):
    assert "run directory /proc/rlad/run cannot be written" in rlad_fails(
        "train", toml, "run_dir=/proc/rlad/run", code=1
    )
    (tmp_path / "file").touch()
    assert "cannot be written" in rlad_fails(
        "train", toml, f"run_dir={tmp_path / 'file' / 'run'}", code=1
    )
    assert "is not a run directory" in rlad_fails("train", toml, f"run_dir={tmp_path / 'file'}")


def test_evaluate_needs_a_task_for_a_model(world):
    assert "add --task, for example --task knights_and_knaves" in rlad_fails(
        "evaluate", world / "student"
    )
    assert "task.type is 'kk'" in rlad_fails("evaluate", world / "student", "--task", "kk")


def test_evaluate_does_not_overwrite_results(finished, tmp_path):
    (tmp_path / "results.jsonl").write_text("mine")
    assert "exists already" in rlad_fails(
        "evaluate", finished, "--output", tmp_path / "results.jsonl"
    )
    assert (tmp_path / "results.jsonl").read_text() == "mine"


def test_evaluate_a_run_without_checkpoint(finished):
    shutil.rmtree(finished / "checkpoints")
    assert "holds no checkpoint" in rlad_fails("evaluate", finished)
