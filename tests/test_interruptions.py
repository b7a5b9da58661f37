"""What can go wrong around a run: a full disk costs one checkpoint, a signal none."""

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

import rlad
import rlad.training
from rlad.run_dir import CannotWriteError, RunDirectory
from tiny_runs import remains, rlad_fails, run_config, write_config, write_unreachable_answers

# --- the disk is full ------------------------------------------------------------------------------------------------------


@contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[None]:
    """A file system of that size; skips the test where mounting is not allowed."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a file system of its own size can only be mounted as root")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


class Fill(rlad.training.Silent):
    """Takes all space of the disk but `leave` bytes: after step 1, or after the validation at step 2."""

    def __init__(self, disk: Path, *, leave: int, before_checkpoint: bool) -> None:
        self.disk, self.leave, self.before_checkpoint = disk, leave, before_checkpoint

    def step(self, result: Any, num_steps: int) -> None:
        if result.step == 1 and not self.before_checkpoint:
            self.fill()

    def evaluated(self, split: str, step: int, estimate: Any) -> None:
        if (split, step) == ("validation", 2) and self.before_checkpoint:
            self.fill()

    def fill(self) -> None:
        free = os.statvfs(self.disk)
        (self.disk / "filler").write_bytes(bytes(max(free.f_bavail * free.f_frsize - self.leave, 0)))


# The files of a checkpoint in the order in which they are written.
FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer_config.json", "tokenizer.json")
FILES += ("trainer/optimizer.safetensors", "trainer/state.json")
PAGE = 4096


@pytest.mark.parametrize("full_at", ["config.json", "model.safetensors", "tokenizer.json", "trainer/state.json"])
def test_disk_full_at_a_checkpoint(world, tmp_path, full_at):
    """Wherever in the checkpoint the space ends: it is absent, the former one whole."""
    wanted = rlad.train(run_config(world, tmp_path / "run")).run_dir
    sizes = {name: (RunDirectory(wanted).checkpoint(2) / name).stat().st_size for name in FILES}
    leave = sum(-(-sizes[name] // PAGE) * PAGE for name in FILES[: FILES.index(full_at)])
    with small_disk(tmp_path / "disk", kilobytes=1000):
        config = run_config(world, tmp_path / "disk" / "run")
        with pytest.raises(CannotWriteError, match=r"cannot be written .*--resume` goes on from step-000000"):
            rlad.train(config, reporter=Fill(tmp_path / "disk", leave=leave, before_checkpoint=True))
        checkpoints = tmp_path / "disk" / "run" / "checkpoints"
        assert [path.name for path in checkpoints.iterdir()] == ["step-000000"]
        AutoModelForCausalLM.from_pretrained(checkpoints / "step-000000")
        (tmp_path / "disk" / "filler").unlink(missing_ok=True)
        rlad.train(config, resume=True)
        assert remains(tmp_path / "disk" / "run") == remains(wanted)


def test_disk_full_on_the_command_line(world, tmp_path):
    with small_disk(tmp_path / "disk", kilobytes=80):
        toml = write_config(tmp_path / "run.toml", run_config(world, tmp_path / "disk" / "run"))
        assert "No space left on device" in rlad_fails("train", toml, code=1)


def test_file_size_limit_at_a_checkpoint(world, tmp_path):
    """The same without root: the system refuses a file of more than 4 kB."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Limit(rlad.training.Silent):
        def evaluated(self, split: str, step: int, estimate: Any) -> None:
            if (split, step) == ("validation", 2):
                resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))

    config = run_config(world, tmp_path / "run")
    try:
        with pytest.raises(CannotWriteError, match=r"File too large.*--resume` goes on from step-000000"):
            rlad.train(config, reporter=Limit())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [step for step, _ in RunDirectory(tmp_path / "run").checkpoints()] == [0]
    assert rlad.train(config, resume=True).run_dir == tmp_path / "run"


def test_disk_full_while_rows_are_written(world, tmp_path):
    """A row may be cut in the middle; the rows before it are kept, and resuming drops the half one."""
    sections = {"optimization": {"num_steps": 40}, "evaluation": {"every_steps": 100}}
    wanted = rlad.train(run_config(world, tmp_path / "run", **sections)).run_dir
    with small_disk(tmp_path / "disk", kilobytes=1000):
        config = run_config(world, tmp_path / "disk" / "run", **sections)
        with pytest.raises(CannotWriteError, match="cannot be written"):
            rlad.train(config, reporter=Fill(tmp_path / "disk", leave=4096, before_checkpoint=False))
        rows = list(RunDirectory(tmp_path / "disk" / "run").read("metrics.jsonl"))
        assert rows and [row["step"] for row in rows] == list(range(1, len(rows) + 1))
        (tmp_path / "disk" / "filler").unlink(missing_ok=True)
        rlad.train(config, resume=True)
        assert remains(tmp_path / "disk" / "run") == remains(wanted)


# --- signals ---------------------------------------------------------------------------------------------------------------


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "rlad", "train", *map(str, arguments)]
    tests = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": tests}
    )


def wait_until(process: subprocess.Popen[str], is_so: Any) -> None:
    while not is_so():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def test_signals_write_a_checkpoint(world, tmp_path):
    """Ctrl-C ends in 130, SIGTERM in 143; both go on with --resume."""
    config = run_config(world, tmp_path / "run", optimization={"num_steps": 100_000}, evaluation={"every_steps": 100_000})
    toml, metrics = write_config(tmp_path / "run.toml", config), tmp_path / "run" / "metrics.jsonl"
    for number, code, arguments in ((signal.SIGINT, 130, ["--json"]), (signal.SIGTERM, 143, ["--resume"])):
        num_before = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
        process = start(toml, *arguments)
        wait_until(process, lambda n=num_before: metrics.exists() and metrics.read_bytes().count(b"\n") > n + 3)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == code and "Traceback" not in stderr
        command = f"rlad train {tmp_path / 'run'} --resume"
        assert stderr.splitlines()[-1] == (
            f"rlad: stopped by {signal.Signals(number).name}; a checkpoint is written, go on with: {command}"
        )
        rows = list(RunDirectory(tmp_path / "run").read("metrics.jsonl"))
        assert RunDirectory(tmp_path / "run").checkpoints()[-1][0] == len(rows) > num_before
    config["optimization"]["num_steps"] = len(rows) + 2
    rlad.train(config, resume=True)
    assert [row["step"] for row in RunDirectory(tmp_path / "run").read("metrics.jsonl")] == list(range(1, len(rows) + 3))


def test_second_ctrl_c_stops_at_once(world, tmp_path, monkeypatch):
    """A verifier that hangs is no safe point; the second Ctrl-C does not wait for one."""
    monkeypatch.setenv("HANGING", str(tmp_path / "hanging"))
    task = {"verifier": "run_verifiers:hang", "timeout_seconds": 500.0, "test_path": write_unreachable_answers(tmp_path)}
    process = start(write_config(tmp_path / "run.toml", run_config(world, tmp_path / "run", task=task)))
    wait_until(process, (tmp_path / "hanging").exists)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 130 and stderr.splitlines()[-1] == "rlad: interrupted"
