"""`rlad train` in two processes (gloo on the CPU): the run of one, stopped, killed, resumed by another number of them."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file

pytestmark = pytest.mark.trl
pytest.importorskip("trl", reason="needs the optional package trl")

from pydantic import TypeAdapter  # noqa: E402

import rlad  # noqa: E402
from rlad.config.file import load_config  # noqa: E402
from rlad.config.teacher import TeacherConfig  # noqa: E402
from rlad.engines.processes.launch import (  # noqa: E402
    LAUNCHES,
    accelerate_arguments,
    config_file,
    environment_of,
    passing_signals_on,
    wait_for_all,
)
from rlad.engines.processes.requirements import require_devices  # noqa: E402
from rlad.runs.directory import RunDirectory  # noqa: E402
from started_processes import start_process  # noqa: E402
from tiny_runs import rlad_fails, run_config, write_config  # noqa: E402

SECTIONS: dict[str, Any] = {
    "engine": {"type": "trl"},
    "objective": {"type": "trrd"},
    "rollout": {"max_completion_tokens": 6, "temperature": 0.7},
    "optimization": {"tokens_per_batch": 60, "max_grad_norm": 0.5, "learning_rate": 1e-2},
}
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
TWO = ("--launch", "ddp", "--num-processes", "2")


def write_run(world: Path, folder: Path, name: str, **sections: Any) -> Path:
    merged = {key: SECTIONS.get(key, {}) | sections.get(key, {}) for key in {**SECTIONS, **sections}}
    return write_config(folder / f"{name}.toml", run_config(world, folder / name, **merged))


def started(*command: object) -> "subprocess.Popen[str]":
    return start_process([sys.executable, "-m", *map(str, command)], ENVIRONMENT)


def ended(process: "subprocess.Popen[str]", code: int = 0) -> str:
    output, errors = process.communicate(timeout=300)
    assert process.returncode == code, (output, errors)
    return errors


def sentences(errors: str) -> list[str]:
    return [line for line in errors.splitlines() if line.startswith("rlad: ")]


def rows_of(run: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return list(RunDirectory(run).read(name))


def same_run(ours: Path, theirs: Path) -> None:
    """Metrics, completions, evaluations and weights, to float rounding."""
    for a, b in zip(rows_of(ours), rows_of(theirs), strict=True):
        assert a.keys() == b.keys()
        for key in (key for key in b if not key.startswith(("time/", "memory/", "sampler/"))):
            assert a[key] == pytest.approx(b[key], rel=1e-5, abs=1e-6), (b["step"], key)
    completions = [
        [[r["completion"]["token_ids"] for r in row["rollouts"]] for row in rows_of(run, "samples.jsonl")]
        for run in (ours, theirs)
    ]
    assert completions[0] == completions[1] and len(completions[0][0]) == 3
    assert rows_of(ours, "eval.jsonl") == rows_of(theirs, "eval.jsonl")
    weights = [load_file(RunDirectory(run).checkpoint(4) / "model.safetensors") for run in (ours, theirs)]
    for name, tensor in weights[1].items():
        assert (weights[0][name] - tensor).abs().max() < 1e-5, name


@pytest.fixture(scope="module")
def one_and_two(world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The run directories of one config, trained by one process and by two."""
    folder = tmp_path_factory.mktemp("ranks")
    one, two = (write_run(world, folder, name) for name in ("one", "two"))
    process = started("rlad", "train", two, *TWO, "--json")
    rlad.train(load_config(str(one)))
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert [json.loads(line)["run_dir"] for line in output.splitlines()] == [str(folder / "two")], "rank 0 alone speaks"
    return folder / "one", folder / "two"


def test_two_processes_make_the_run_of_one(one_and_two):
    one, two = one_and_two
    same_run(two, one)
    assert len({row["optimization/loss"] for row in rows_of(one)}) > 2
    assert sorted(path.name for path in one.iterdir()) == sorted(path.name for path in two.iterdir())
    assert RunDirectory(two).is_finished()


def test_a_teacher_split_over_two_processes_makes_the_same_run(world, one_and_two, tmp_path):
    engine = {"type": "trl", "trl": {"teacher_is_sharded": True}}
    ended(started("rlad", "train", write_run(world, tmp_path, "split", engine=engine), *TWO))
    same_run(tmp_path / "split", one_and_two[0])


def back_to_step_2(run: Path, folder: Path, name: str) -> Path:
    """A copy of a run as it was at its second step; returns its directory."""
    copy = shutil.copytree(run, folder / name)
    shutil.rmtree(RunDirectory(copy).checkpoint(4))
    (copy / "README.md").unlink()
    config = copy / "config.toml"
    config.write_text(config.read_text().replace(str(run), str(copy)))
    return copy


def test_another_number_of_processes_goes_on_from_a_checkpoint(one_and_two, tmp_path):
    one, two = one_and_two
    of_one, of_two = back_to_step_2(one, tmp_path, "of-one"), back_to_step_2(two, tmp_path, "of-two")
    process = started("rlad", "train", of_one, "--resume", *TWO)
    rlad.train(load_config(str(of_two)), resume=True)
    ended(process)
    same_run(of_one, one)
    same_run(of_two, one)


def after_steps(run: Path, number: int, process: "subprocess.Popen[str]") -> None:
    """Waits until so many steps are recorded."""
    while len(rows_of(run)) < number:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def test_ctrl_c_and_a_killed_rank(world, tmp_path):
    """Ctrl-C: one checkpoint, one sentence, 130. A rank that dies: all end within seconds, the sentence names it."""
    endless = {"optimization": {"num_steps": 5000}, "evaluation": {"every_steps": 5000}}
    config, run = write_run(world, tmp_path, "run", **endless), tmp_path / "run"
    process = started("rlad", "train", config, *TWO)
    after_steps(run, 2, process)
    process.send_signal(signal.SIGINT)
    (sentence,) = sentences(ended(process, 130))
    assert sentence.startswith("rlad: stopped by SIGINT; a checkpoint is written, go on with: rlad train")
    steps = [step for step, _ in RunDirectory(run).checkpoints()]
    assert steps == [0, len(rows_of(run))]

    process = started("rlad", "train", run, "--resume", *TWO)
    after_steps(run, steps[-1] + 2, process)
    ranks = {child.environ()["RANK"]: child for child in psutil.Process(process.pid).children()}
    ranks["1"].kill()
    killed = time.monotonic()
    (sentence,) = sentences(ended(process, 1))
    assert "rank 1 of 2 was ended by SIGKILL (as the system does when memory runs out), and the others with it" in sentence
    assert time.monotonic() - killed < 15 and not ranks["0"].is_running()


def test_a_signal_while_the_ranks_start_reaches_all_of_them():
    """The first rank runs already when it comes, the second not yet."""

    def start() -> list[Any]:
        command = ["sleep", "60"]
        first = start_process(command, {})
        os.kill(os.getpid(), signal.SIGTERM)
        return [first, start_process(command, {})]

    with passing_signals_on(start) as (processes, signals):
        assert [process.wait(timeout=10) for process in processes] == [-signal.SIGTERM] * 2
        assert signals == [signal.SIGTERM]


def test_the_others_may_finish_after_a_signal(monkeypatch):
    """As the first rank does, which writes the checkpoint; after a second signal, or a failure, their time is short."""
    monkeypatch.setattr("rlad.engines.processes.launch.GRACE_SECONDS", 0.2)

    def ended_with(code: int, signals: list[int]) -> tuple[set[int], int]:
        commands = [["sh", "-c", "sleep 1"], ["sh", "-c", f"exit {code}"]]
        slow, quick = (subprocess.Popen(command, start_new_session=True) for command in commands)
        return wait_for_all([slow, quick], signals), slow.returncode

    assert ended_with(143, [signal.SIGTERM]) == (set(), 0)
    assert ended_with(130, [signal.SIGINT, signal.SIGINT]) == ({0}, -signal.SIGKILL)
    assert ended_with(1, []) == ({0}, -signal.SIGKILL)


def test_under_torchrun_each_rank_says_who_it_is(world, tmp_path):
    """Several processes of a config that one alone can train; nothing is written."""
    config = write_run(world, tmp_path, "run", engine={"type": "native"})
    errors = ended(started("torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "rlad", "train", config), 1)
    expected = "engine.type = 'native' trains in one process, and this is one of 2; start one alone, or use engine.type=trl."
    assert sorted(sentences(errors)) == [f"rlad: rank {rank} of 2: {expected}" for rank in range(2)]
    assert expected in errors.split("Root Cause")[1] and not (tmp_path / "run").exists()


def test_accelerate_on_the_cpu_is_refused_where_it_starts_one_process(world, tmp_path):
    config = write_run(world, tmp_path, "run")
    words = ("accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes", "2", "-m", "rlad", "train", config)
    (sentence,) = sentences(ended(started(*words), 1))
    assert "`accelerate launch --cpu` started one process instead of 2" in sentence and not (tmp_path / "run").exists()


# --- what cannot be started -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "sections", "sentence"),
    [
        (TWO, {"engine": {"type": "native"}}, "engine.type = 'native' trains in one process, and --launch starts several"),
        (TWO, {"objective": {"type": "sft"}, "engine": {"type": "native"}}, "objective = 'sft' trains in one process"),
        (("--launch", "ddp", "--num-processes", "0"), {}, "--num-processes is 0; give at least 1"),
        (("--launch", "ddp"), {}, "does not know how many processes are wanted; add --num-processes 2"),
        (("--num-processes", "2"), {}, "--num-processes and --port are for --launch; add --launch ddp"),
        (
            ("--launch", "ddp", "--num-processes", "3"),
            {},
            "3 processes cannot share rollout.prompts_per_batch = 4 prompts evenly, 12 completions in each optimiser step; use "
            "1 or 2 or 4 processes",
        ),
        (
            ("--launch", "fsdp2", "--num-processes", "2"),
            {},
            "fsdp2 needs GPUs: on the CPU Accelerate would silently train by DDP",
        ),
        (("--launch", "deepspeed", "--num-processes", "2"), {}, "deepspeed needs GPUs"),
        ((*TWO, "--port", "70000"), {}, "--port 70000 cannot be used"),
    ],
)
def test_what_cannot_be_started_is_one_sentence(world, tmp_path, flags, sections, sentence):
    sections = {"student": {"device": "cpu"}} | sections
    assert sentence in rlad_fails("train", write_run(world, tmp_path, "run", **sections), *flags)
    assert not (tmp_path / "run").exists()


def test_a_taken_port_is_one_sentence(world, tmp_path):
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        sentence = rlad_fails("train", write_run(world, tmp_path, "run"), *TWO, "--port", port)
    assert f"--port {port} cannot be used ([Errno 98] Address already in use); give another one" in sentence


def test_gpus_and_packages_that_are_not_there(world, tmp_path, monkeypatch):
    """As on a machine with one GPU."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    config = write_run(world, tmp_path, "run")
    assert "2 processes need a GPU each, and this machine has 1; start fewer, or use student.device = 'cpu'" in rlad_fails(
        "train", config, *TWO
    )
    assert "student.device = 'cuda:0' names one GPU" in rlad_fails("train", config, "student.device=cuda:0", *TWO)
    itself = {"type": "privileged", "template": "{prompt}", "teacher": {"type": "ema", "update_rate": 1}}
    sentence = "the teacher is the student itself (type 'ema'), whose weights fsdp2 splits under it; use --launch ddp"
    taught = load_config(str(config)).model_copy(update={"teacher": TypeAdapter(TeacherConfig).validate_python(itself)})
    with pytest.raises(ValueError, match=re.escape(sentence)):
        require_devices(taught, "fsdp2", 1)
    require_devices(taught, "deepspeed", 1)
    if not any((Path(place) / "deepspeed").is_dir() for place in sys.path):
        sentence = rlad_fails("train", config, "--launch", "deepspeed", "--num-processes", "1")
        assert "needs DeepSpeed, which is not installed; install it with: pip install deepspeed" in sentence
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "--launch starts processes, and this is already one of 2" in rlad_fails("train", config, *TWO)


# --- accelerate's configuration ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LAUNCHES)
def test_accelerate_takes_the_shipped_configurations(kind):
    from accelerate.commands.config.config_args import load_config_from_file

    assert load_config_from_file(str(config_file(kind))).to_dict()["num_processes"] == 8
    arguments = accelerate_arguments(kind, 2, 29123)
    assert (arguments.num_processes, arguments.main_process_port, arguments.mixed_precision) == (2, 29123, "no")
    flags = {"ddp": arguments.multi_gpu, "fsdp2": arguments.use_fsdp, "deepspeed": arguments.use_deepspeed}
    assert [name for name, is_set in flags.items() if is_set] == [kind]


def test_what_the_ranks_are_told(world, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    config = load_config(str(write_run(world, tmp_path, "run", student={"device": "cpu"})))
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29123", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    assert environment_of(config, "ddp", 2, 29123).items() >= (meeting | {"ACCELERATE_USE_CPU": "true"}).items()
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    on_gpus = load_config(str(write_run(world, tmp_path, "run")))
    told = environment_of(on_gpus, "fsdp2", 2, 29123)
    split = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}
    assert told.items() >= (meeting | split | {"OMP_NUM_THREADS": "3"}).items() and "ACCELERATE_USE_CPU" not in told
    told = environment_of(on_gpus, "deepspeed", 2, 29123)
    assert told.items() >= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}.items()
