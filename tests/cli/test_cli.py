"""The command line as a person, a pipe and a script see it."""

import json
import os
import pty
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tomli_w
import torch
from click.testing import CliRunner, Result
from transformers import AutoModelForCausalLM, AutoTokenizer

import rlad
from rlad.cli.main import main
from rlad.config.catalogue import CONFIGS
from rlad.config.file import load_config
from rlad.config.presets import PRESETS
from rlad.objectives import OBJECTIVES
from rlad.runs.directory import RunDirectory
from tiny_runs import OFTEN_CORRECT, run_config, write_config

ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def rlad_cli(*arguments: object, code: int = 0, stdin: str | None = None) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments], input=stdin)
    assert result.exit_code == code, (result.output, result.exception)
    return result


@pytest.fixture(scope="module")
def run_dir(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    return rlad.train(run_config(world, folder / "run", task=OFTEN_CORRECT)).run_dir


@pytest.fixture
def toml(world: Path, tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(tomli_w.dumps(run_config(world, tmp_path / "run")))
    return path


# --- help and lists -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "verb",
    [[], ["train"], ["check"], ["sample"], ["evaluate"], ["serve-teacher"], ["list"], ["models"]],
)
def test_help_is_whole_and_fits_a_terminal(verb):
    lines = rlad_cli(*verb, "--help").stdout.splitlines()
    assert len(lines) < 35 and max(map(len, lines)) <= 100
    assert not any(line.startswith("  ") and line.endswith("...") for line in lines), (
        "a summary was cut off"
    )


def test_version():
    assert rlad_cli("--version").stdout.strip().endswith(rlad.__version__)


def test_unknown_command():
    assert "No such command 'trian'" in rlad_cli("trian", code=2).stderr


@pytest.mark.parametrize("what", CONFIGS)
def test_list(what):
    lines = rlad_cli("list", what).stdout.splitlines()
    names = [*CONFIGS[what], *(PRESETS if what == "objectives" else ())]
    described = list(json.loads(rlad_cli("list", what, "--json").stdout))
    if what == "settings":
        # These are of a kind, which has a list of its own, or single settings.
        names += ["objective", "task", "teacher", "seed", "run_dir"]
    assert [line.split()[0] for line in lines] == names
    assert described == names


@pytest.mark.parametrize(
    ("what", "name"), [(what, name) for what, configs in CONFIGS.items() for name in configs]
)
def test_list_name_shows_every_setting_as_it_stands_in_a_config(what, name):
    text = rlad_cli("list", what, name).stdout
    assert json.loads(rlad_cli("list", what, name, "--json").stdout) == {
        "name": name,
        "text": text.rstrip("\n"),
    }
    # After an objective's section may come the one of the teacher that it brings along.
    own = text[text.index("\n[") + 1 :].partition("\n\nIf no [teacher]")[0]
    section, *within = own.split("\n\n")
    shown = re.findall(r"^(?:# )?(\w+)(?: = |$| +#)", section, flags=re.MULTILINE)
    # [teacher.teacher], [task.tasks.NAME]; [teacher.context.texts] is of [teacher.context]
    shown += {re.match(r"\[\w+\.(\w+)", part)[1] for part in within}
    assert sorted(shown) == sorted(CONFIGS[what][name].model_fields)


def test_list_objective_shows_its_formula():
    text = rlad_cli("list", "objectives", "trrd").stdout
    assert OBJECTIVES["trrd"].formula in text
    assert re.search(
        r"^alpha = 0\.5 +# 1 is GRPO, .* or \{ start, end, change_per_step \}$",
        text,
        flags=re.MULTILINE,
    )
    assert re.search(
        r'^ratio_level = "token" +# .*one of "token", "sequence"$', text, flags=re.MULTILINE
    )


def test_a_printed_section_can_be_pasted_into_a_config(world, tmp_path):
    text = rlad_cli("list", "objectives", "kdrl").stdout
    config = run_config(world, tmp_path / "run")
    (tmp_path / "run.toml").write_text(tomli_w.dumps(config) + text[text.index("\n[") :])
    assert (
        load_config(tmp_path / "run.toml").objective
        == load_config(tmp_path / "run.toml", ["objective=kdrl"]).objective
    )


def test_list_of_an_unknown_name():
    assert (
        "'trd' is not one of the objectives: did you mean 'trrd'?"
        in rlad_cli("list", "objectives", "trd", code=2).stderr
    )


def test_init_says_what_to_install(tmp_path, monkeypatch):
    absent = ["reasoning_gym"]
    monkeypatch.setattr("rlad.cli.init.find_spec", lambda name: None if name in absent else name)
    model = "HuggingFaceTB/SmolLM2-135M-Instruct"
    how = ("init", "--student", model, "--task", "countdown", "--output", tmp_path / "run.toml")
    hint = "pip install 'rlad[reasoning-gym]'   # not installed yet"
    assert hint in rlad_cli(*how).stdout
    absent.clear()
    assert "pip install" not in rlad_cli(*how, "--overwrite").stdout
    absent.append("torchao")
    pair = ("--student", "Qwen/Qwen3-1.7B", "--teacher", "Qwen/Qwen3-8B", "--gpu", "l4")
    hint = "pip install 'rlad[quantization]'   # not installed yet"
    assert hint in rlad_cli(*how, *pair, "--overwrite").stdout


def test_a_setting_written_as_an_option_is_named():
    told = rlad_cli("train", "--num-steps", "3", code=2).stderr
    assert "written KEY=VALUE, without dashes: did you mean 'optimization.num_steps'?" in told
    assert "KEY=VALUE" not in rlad_cli("doctor", "runs/x", "--num-steps", code=2).stderr
    assert rlad_cli("check", "--qqqq", code=2).stderr.endswith("KEY=VALUE, without dashes\n")


# --- check ----------------------------------------------------------------------------------------


def test_check_is_one_screen_and_trains_nothing(toml, tmp_path):
    text = rlad_cli("check", toml).stdout
    assert len(text.splitlines()) < 60
    for part in (
        "objective.type = \"trrd\"",
        "4 optimiser steps, 1 on each batch of 12 rollouts (4 prompts x 3)",
        OBJECTIVES["trrd"].formula.splitlines()[0],
        "✓ vocabulary: all 7 tokens of the student are the teacher's",
        "✓ end token: '<eos>' for both",
        "✓ chat template: none for both",
        "✓ thinking markers: none for both",
        "✓ prompts: the longest has 4 tokens, with its completion 8 of 256",
        "✓ memory: about 0.00 of",
        "this can be trained",
    ):  # fmt: skip
        assert part in text, part
    assert not (tmp_path / "run").exists()


def test_check_as_json(toml):
    report = json.loads(rlad_cli("check", toml, "--json").stdout)
    assert report["ok"] is True and report["config"]["optimization"]["max_grad_norm"] == 1.0
    assert "error" not in {finding["level"] for finding in report["findings"]}
    assert (
        report["memory_bytes"]["total"]
        == sum(v for k, v in report["memory_bytes"].items() if k != "total")
        > 0
    )


def test_check_counts_parameters_right(world, toml):
    memory = json.loads(rlad_cli("check", toml, "optimization.kl_coef=0.1", "--json").stdout)[
        "memory_bytes"
    ]
    num_parameters = sum(
        p.numel() for p in AutoModelForCausalLM.from_pretrained(world / "student").parameters()
    )
    assert (memory["student_weights"], memory["gradients_and_optimizer"]) == (
        4 * num_parameters,
        12 * num_parameters,
    )
    assert memory["teacher_weights"] == memory["reference_weights"] == 4 * num_parameters
    # 12 rows of 4 + 4 tokens and room for 64 more; keys and values of 2 layers, 1 head of 8 numbers
    # in float32.
    assert memory["sampler_cache"] == 12 * (8 + 64) * 2 * 2 * 8 * 4


def test_check_of_a_run_that_is_there(run_dir):
    text = rlad_cli("check", run_dir).stdout
    assert (
        "! run directory:" in text
        and "train needs --resume, --overwrite or another run_dir" in text
    )
    assert "this can be trained" in text


def test_plan_names_what_is_computed(toml):
    def plan(*overrides: str) -> str:
        return "\n".join(json.loads(rlad_cli("check", toml, *overrides, "--json").stdout)["plan"])

    assert (
        "the teacher scores each sampled token once" in plan()
        and "advantage 0 are left out" in plan()
    )
    assert "no teacher" in plan("objective=grpo")
    several = plan("optimization.steps_per_rollout_batch=2", "optimization.kl_coef=0.1")
    assert (
        "the old policy scores" in several and "KL leash" in several and "left out" not in several
    )


# --- train ----------------------------------------------------------------------------------------


def test_train_in_a_pipe_is_plain_and_ends_with_what_to_do_next(toml, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "rlad", "train", str(toml)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == "" and not ANSI.search(done.stdout)
    for part in (
        "step 0  test pass@1 ",
        "step 4/4  reward ",
        "tokens/s",
        "test pass@1 before  ",
        "test pass@1 after   ",
    ):
        assert part in done.stdout, part
    assert (
        f"run directory   {tmp_path / 'run'}  (" in done.stdout
        and str(tmp_path / "run" / "curve.png") in done.stdout
    )
    commands = [line for line in done.stdout.splitlines() if line.startswith("rlad ")]
    assert len(commands) == 6
    for command in commands:
        rlad_cli(*shlex.split(command)[1:], stdin="w5 w6")


def test_train_on_a_terminal_shows_a_bar(world, tmp_path):
    toml = tmp_path / "run.toml"
    toml.write_text(tomli_w.dumps(run_config(world, tmp_path / "run", task=OFTEN_CORRECT)))
    ours, theirs = pty.openpty()
    modules = {"PYTHONPATH": os.pathsep.join(sys.path)}
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "80"} | modules
    process = subprocess.Popen(
        [sys.executable, "-m", "rlad", "train", str(toml)],
        stdout=theirs,
        stderr=theirs,
        env=environment,
    )
    os.close(theirs)
    shown = b""
    try:
        while piece := os.read(ours, 65536):
            shown += piece
    except OSError:  # the other end was closed
        pass
    assert process.wait() == 0
    lines = ANSI.sub("", shown.decode()).replace("\r", "\n").splitlines()
    bars = [line for line in lines if re.search(r"━.* 4/4 .*left", line)]
    # On a fast machine the figures take a second line.
    figures = re.search(
        r"reward \d\.\d\d held-out pass@1 [\d.]+% .{8} gated \+[\d.]+% -[\d.]+% [\d,]+ tokens/s",
        " ".join(" ".join(lines).split()),
    )
    assert bars and figures
    assert max(map(len, bars)) <= 80
    assert not any("Loading weights" in line or "Writing model" in line for line in lines)


def test_train_as_json(toml, tmp_path):
    result = rlad_cli("train", toml, "--json")
    (line,) = result.stdout.splitlines()
    assert set(json.loads(line)) == {"run_dir", "before", "after", "seconds"}
    assert json.loads(line)["run_dir"] == str(tmp_path / "run")
    assert set(json.loads(line)["before"]) == {"mean", "low", "high"}


def test_overrides_win_over_the_file(toml, tmp_path):
    rlad_cli(
        "train",
        toml,
        "objective=grpo",
        "optimization.num_steps=1",
        f"run_dir={tmp_path / 'other'}",
        "--json",
    )
    config = load_config(tmp_path / "other")
    assert (config.objective.type, config.optimization.num_steps) == ("grpo", 1)
    assert len(list(RunDirectory(tmp_path / "other").read("metrics.jsonl"))) == 1


# --- what a run leaves, sample, evaluate ----------------------------------------------------------


def test_checkpoints_load_as_any_model_and_differ_from_the_start(world, run_dir):
    last = RunDirectory(run_dir).checkpoints()[-1][1]
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(last),
        AutoTokenizer.from_pretrained(last),
    )
    start = AutoModelForCausalLM.from_pretrained(world / "student")
    assert not torch.equal(model.lm_head.weight, start.lm_head.weight)
    assert (
        tokenizer("1 + 1 =")["input_ids"]
        == AutoTokenizer.from_pretrained(world / "student")("1 + 1 =")["input_ids"]
    )


def test_files_of_a_run(run_dir):
    names = {path.name for path in run_dir.iterdir()}
    assert names == {
        "config.toml", "run.json", "metrics.jsonl", "eval.jsonl", "samples.jsonl", "checkpoints",
        "curve.png", "README.md", ".lock",
    }  # fmt: skip
    about = json.loads((run_dir / "run.json").read_text())
    assert about["versions"]["torch"] == torch.__version__ and about["seed"] == 0
    card = (run_dir / "README.md").read_text()
    assert (
        card.startswith("---\nlibrary_name: transformers\n")
        and 'folder = "checkpoints/step-000004"' in card
    )
    assert (run_dir / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_the_stored_config_repeats_the_run(run_dir, tmp_path):
    again = rlad.train(
        load_config(run_dir / "config.toml", [f"run_dir={tmp_path / 'run'}"])
    ).run_dir
    for name in ("samples.jsonl", "eval.jsonl"):
        assert (again / name).read_bytes() == (run_dir / name).read_bytes()


def test_sample(run_dir):
    text = rlad_cli("sample", run_dir, "--num-prompts", 1).stdout
    assert text.startswith(f"student: {RunDirectory(run_dir).checkpoints()[-1][1]}")
    assert text.count("log πS - log πT: mean ") == 3 and " + " in text


def test_sample_as_json_agrees_with_transformers(run_dir):
    rows = [
        json.loads(line)
        for line in rlad_cli("sample", run_dir, "--num-prompts", 2, "--json").stdout.splitlines()
    ]
    assert len(rows) == 6
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(rows[0]["student"]),
        AutoTokenizer.from_pretrained(rows[0]["student"]),
    )
    for row in rows:
        prompt, ids = (
            tokenizer(row["prompt"])["input_ids"],
            tokenizer.convert_tokens_to_ids(row["tokens"]),
        )
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).squeeze(1)
        assert torch.allclose(torch.tensor(row["student_logprobs"]), expected, atol=1e-5)
        assert len(row["teacher_logprobs"]) == len(ids) and row["verdict"] in ("correct", "wrong")


def test_sample_without_a_run_shows_the_initial_student(world, toml):
    rows = rlad_cli(
        "sample", toml, "objective=grpo", "--num-prompts", 1, "--json"
    ).stdout.splitlines()
    row = json.loads(rows[0])
    assert row["student"] == str(world / "student") and row["teacher_logprobs"] is None


def test_sample_asks_a_teacher_with_peers_where_it_speaks(world, tmp_path):
    """The only correct completion of a group has no other one to be shown, and in a group without
    any there is none at all."""
    config = run_config(world, tmp_path / "run", rollout={"group_size": 8})
    config["task"]["verifier"] = "user_verifiers:last_digit"
    inner = {"model": str(world / "teacher")}
    config["teacher"] = {"type": "privileged", "teacher": inner, "context": {"num_successes": 1}}
    path = write_config(tmp_path / "peers.toml", config)
    output = rlad_cli("sample", path, "--num-prompts", 3, "--json").stdout
    rows = [json.loads(line) for line in output.splitlines()]
    groups = [rows[i : i + 8] for i in range(0, len(rows), 8)]
    spoken = []
    for group in groups:
        for row in group:
            others = {o["completion"] for o in group if o["verdict"] == "correct"}
            does = bool(others - {row["completion"], ""})
            assert (row["teacher_logprobs"] is not None) is does
            spoken.append(does)
    assert True in spoken and False in spoken


def test_evaluate_a_run_takes_its_best_checkpoint_and_its_task(run_dir):
    summary = json.loads(
        rlad_cli("evaluate", run_dir, "--num-samples", 4, "--split", "validation", "--json").stdout
    )
    assert summary["model"] == str(RunDirectory(run_dir).best_checkpoint()[1])
    rows = [row for row in RunDirectory(run_dir).read("eval.jsonl") if row["split"] == "validation"]
    assert summary["mean@4"]["mean"] == max(row["pass@1"]["mean"] for row in rows)


def test_evaluate_a_checkpoint_as_a_table(run_dir):
    last = RunDirectory(run_dir).checkpoints()[-1][1]
    text = rlad_cli("evaluate", last, "--num-samples", 2).stdout
    assert text.startswith(f"{last}\n2 test problems of jsonl x 2 samples\n")
    assert all(
        f"{name} " in text
        for name in ("mean@2", "pass@1", "pass@2", "truncated", "could not be judged")
    )


def test_python_m_rlad():
    done = subprocess.run(
        [sys.executable, "-m", "rlad", "--help"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("Usage: rlad [OPTIONS] COMMAND")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
@pytest.mark.parametrize("arguments", [["list", "tasks"], ["check", "--without-models"]])
def test_a_full_disk_under_standard_output_is_a_sentence(arguments):
    command = [sys.executable, "-m", "rlad", *arguments]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "standard output cannot be written (No space left on device)" in done.stderr


def test_what_the_terminal_cannot_show_is_replaced():
    command = [sys.executable, "-m", "rlad", "check", "--without-models"]
    environment = os.environ | {"PYTHONIOENCODING": "latin-1"}
    done = subprocess.run(command, capture_output=True, env=environment)
    assert done.returncode == 0 and b"can be trained" in done.stdout + done.stderr


def test_a_deleted_folder_is_a_sentence(tmp_path):
    folder = tmp_path / "gone"
    folder.mkdir()
    done = subprocess.run(
        ["sh", "-c", f'rmdir "{folder}"; exec "$@"', "sh", sys.executable, "-m", "rlad", "list"],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "the current folder has been deleted" in done.stderr
