"""What can go wrong around a run: a full disk costs one checkpoint, a signal none."""

import inspect
import itertools
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

import rlad
import rlad.engines.making
import rlad.engines.native.loop
import rlad.rollouts.evaluation
import rlad.training.run
from conformance_server import ConformanceServer
from rlad.cli.main import main
from rlad.engines.native.loop import NativeEngine
from rlad.models.loading import load_language_model
from rlad.runs.directory import CannotWriteError, RunDirectory
from rlad.tasks.worker import Worker
from started_processes import start_process
from tiny_runs import remains, rlad_fails, run_config, write_config, write_unreachable_answers

# --- the disk is full -----------------------------------------------------------------------------


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


class Fill(rlad.training.reporter.Reporter):
    """Takes all space of the disk but `leave` bytes: after step 1, or after the validation at step
    2."""

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
        (self.disk / "filler").write_bytes(
            bytes(max(free.f_bavail * free.f_frsize - self.leave, 0))
        )


# The files of a checkpoint in the order in which they are written.
FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer_config.json",
    "tokenizer.json",
)
FILES += ("trainer/optimizer.safetensors", "trainer/state.json")
PAGE = 4096


@pytest.mark.parametrize(
    "full_at", ["config.json", "model.safetensors", "tokenizer.json", "trainer/state.json"]
)
def test_disk_full_at_a_checkpoint(world, tmp_path, full_at):
    """Wherever in the checkpoint the space ends: it is absent, the former one whole."""
    wanted = rlad.train(run_config(world, tmp_path / "run")).run_dir
    sizes = {name: (RunDirectory(wanted).checkpoint(2) / name).stat().st_size for name in FILES}
    leave = sum(-(-sizes[name] // PAGE) * PAGE for name in FILES[: FILES.index(full_at)])
    with small_disk(tmp_path / "disk", kilobytes=1000):
        config = run_config(world, tmp_path / "disk" / "run")
        with pytest.raises(
            CannotWriteError, match=r"cannot be written .*--resume` continues from step-000000"
        ):
            rlad.train(
                config, reporter=Fill(tmp_path / "disk", leave=leave, before_checkpoint=True)
            )
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

    class Limit(rlad.training.reporter.Reporter):
        def evaluated(self, split: str, step: int, estimate: Any) -> None:
            if (split, step) == ("validation", 2):
                resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))

    config = run_config(world, tmp_path / "run")
    try:
        with pytest.raises(
            CannotWriteError, match=r"File too large.*--resume` continues from step-000000"
        ):
            rlad.train(config, reporter=Limit())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [step for step, _ in RunDirectory(tmp_path / "run").checkpoints()] == [0]
    assert rlad.train(config, resume=True).run_dir == tmp_path / "run"


def test_disk_full_while_rows_are_written(world, tmp_path):
    """A row may be cut in the middle; the rows before it are kept, and resuming drops the half
    one."""
    sections = {"optimization": {"num_steps": 40}, "evaluation": {"every_steps": 100}}
    wanted = rlad.train(run_config(world, tmp_path / "run", **sections)).run_dir
    with small_disk(tmp_path / "disk", kilobytes=1000):
        config = run_config(world, tmp_path / "disk" / "run", **sections)
        with pytest.raises(CannotWriteError, match="cannot be written"):
            rlad.train(
                config, reporter=Fill(tmp_path / "disk", leave=4096, before_checkpoint=False)
            )
        rows = list(RunDirectory(tmp_path / "disk" / "run").read("metrics.jsonl"))
        assert rows and [row["step"] for row in rows] == list(range(1, len(rows) + 1))
        (tmp_path / "disk" / "filler").unlink(missing_ok=True)
        rlad.train(config, resume=True)
        assert remains(tmp_path / "disk" / "run") == remains(wanted)


# --- signals --------------------------------------------------------------------------------------


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "rlad", "train", *map(str, arguments)]
    tests = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    return start_process(command, {"PYTHONPATH": tests})


def wait_until(process: subprocess.Popen[str], is_so: Any) -> None:
    while not is_so():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def test_signals_write_a_checkpoint(world, tmp_path):
    """Ctrl-C ends in 130, SIGTERM in 143, Slurm's warning in 138; each goes on with --resume."""
    config = run_config(
        world,
        tmp_path / "run",
        optimization={"num_steps": 100_000},
        evaluation={"every_steps": 100_000},
    )
    toml, metrics = write_config(tmp_path / "run.toml", config), tmp_path / "run" / "metrics.jsonl"
    for number, code, arguments in (
        (signal.SIGINT, 130, ["--json"]),
        (signal.SIGTERM, 143, ["--resume"]),
        (signal.SIGUSR1, 138, ["--resume"]),
    ):
        num_before = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
        process = start(toml, *arguments)
        wait_until(
            process,
            lambda n=num_before: metrics.exists() and metrics.read_bytes().count(b"\n") > n + 3,
        )
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == code and "Traceback" not in stderr
        command = f"rlad train {tmp_path / 'run'} --resume"
        assert stderr.splitlines()[-1] == (
            f"rlad: stopped by {signal.Signals(number).name}; a checkpoint is written, "
            f"continue with: {command}"
        )
        rows = list(RunDirectory(tmp_path / "run").read("metrics.jsonl"))
        assert RunDirectory(tmp_path / "run").checkpoints()[-1][0] == len(rows) > num_before
    config["optimization"]["num_steps"] = len(rows) + 2
    rlad.train(config, resume=True)
    assert [row["step"] for row in RunDirectory(tmp_path / "run").read("metrics.jsonl")] == list(
        range(1, len(rows) + 3)
    )


def test_second_ctrl_c_stops_at_once(world, tmp_path, monkeypatch):
    """A verifier that hangs is no safe point; the second Ctrl-C does not wait for one."""
    monkeypatch.setenv("HANGING", str(tmp_path / "hanging"))
    task = {
        "verifier": "run_verifiers:hang",
        "timeout_seconds": 500.0,
        "test_path": write_unreachable_answers(tmp_path),
    }
    process = start(
        write_config(tmp_path / "run.toml", run_config(world, tmp_path / "run", task=task))
    )
    wait_until(process, (tmp_path / "hanging").exists)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 130 and stderr.splitlines()[-1] == "rlad: interrupted"


# Where a signal comes: (module or class, its function, which call of it).
PLACES: dict[str, tuple[Any, str, int]] = {
    "loading models": (rlad.engines.making, "load_student", 1),
    "writing a checkpoint": (rlad.engines.native.loop, "save_state", 2),
    "evaluation": (rlad.rollouts.evaluation, "graded_groups", 1),
    "generation": (NativeEngine, "make_rollout_batch", 2),
    "teacher": (NativeEngine, "_ask_teacher", 2),
    "update": (NativeEngine, "update", 2),
}


def train_with_signals(toml: Path, *places: tuple[Any, str, int], number: int, errors: Path) -> int:
    """The exit code of `rlad train` in a fork that gets a signal at each of these places; `errors`
    is its stderr."""
    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    sys.stdout = sys.stderr = errors.open("w")
    for owner, name, at in places:
        setattr(owner, name, signalling(getattr(owner, name), number, at))
    code = 1
    try:
        main(["train", str(toml)], standalone_mode=False)
        code = 0
    except SystemExit as stopped:
        code = int(str(stopped.code))
    finally:
        sys.stderr.flush()
        os._exit(code)


def signalling(function: Callable[..., Any], number: int, at: int) -> Callable[..., Any]:
    calls = itertools.count(1)

    def called(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == at:
            os.kill(os.getpid(), number)
        return function(*args, **kwargs)

    return called


@pytest.fixture(scope="module")
def undisturbed(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return remains(
        rlad.train(run_config(world, tmp_path_factory.mktemp("undisturbed") / "run")).run_dir
    )


@pytest.mark.parametrize(
    ("where", "number"), list(zip(PLACES, [signal.SIGINT, signal.SIGTERM] * 3, strict=True))
)
def test_a_signal_anywhere_ends_the_run_within_seconds(
    world, tmp_path, undisturbed, monkeypatch, where, number
):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    config = run_config(world, tmp_path / "run")
    toml, started = write_config(tmp_path / "run.toml", config), time.monotonic()
    code = train_with_signals(toml, PLACES[where], number=number, errors=tmp_path / "errors")
    assert code == 128 + number and time.monotonic() - started < 20
    said = (tmp_path / "errors").read_text().splitlines()[-1]
    is_loading = where == "loading models"
    then = (
        "training had not begun and nothing is written"
        if is_loading
        else "a checkpoint is written, continue with"
    )
    assert said.startswith(f"rlad: stopped by {signal.Signals(number).name}; {then}")
    assert (tmp_path / "run").exists() is not is_loading
    rlad.train(config, resume=not is_loading)
    assert remains(tmp_path / "run") == undisturbed


def test_a_second_signal_while_the_checkpoint_is_written_leaves_the_former_one(
    world, tmp_path, undisturbed, monkeypatch
):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    config = run_config(world, tmp_path / "run")
    toml = write_config(tmp_path / "run.toml", config)
    places = (PLACES["update"], (rlad.engines.native.loop, "save_state", 2))
    assert (
        train_with_signals(toml, *places, number=signal.SIGINT, errors=tmp_path / "errors") == 130
    )
    assert (tmp_path / "errors").read_text().splitlines()[-1] == "rlad: interrupted"
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000000"]
    rlad.train(config, resume=True)
    assert remains(tmp_path / "run") == undisturbed


def test_a_signal_while_a_served_teacher_hangs(world, tmp_path):
    """The server takes the request and does not answer it."""
    with ConformanceServer(load_language_model(str(world / "teacher"))) as server:
        server.slow_seconds = 600.0
        teacher = {
            "type": "served",
            "urls": [server.url],
            "model": "tiny",
            "tolerance": 1e-3,
            "timeout_seconds": 600.0,
        }
        config = run_config(
            world, tmp_path / "run", teacher=teacher, optimization={"num_steps": 100_000}
        )
        process = start(write_config(tmp_path / "run.toml", config))
        wait_until(process, (tmp_path / "run" / "metrics.jsonl").exists)
        server.lasting_fault = "slow"
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=20)
    assert process.returncode == 130 and "a checkpoint is written" in stderr.splitlines()[-1]


def test_a_signal_to_all_processes_leaves_no_completion_unjudged(world, tmp_path, monkeypatch):
    """It ends the verifier's process too, here while the last completion of a rollout batch is
    judged."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setenv("SLOW", str(tmp_path / "slow"))
    sections = {"objective": {"type": "grpo"}, "task": {"verifier": "run_verifiers:slow"}}
    wanted = rlad.train(run_config(world, tmp_path / "wanted" / "run", **sections)).run_dir
    config = run_config(world, tmp_path / "run", **sections)
    process = os.fork()
    if not process:
        os.setpgid(0, 0)
        after_rollouts, original = itertools.count(1), Worker.call

        def judge(self: Worker, *args: Any) -> Any:
            is_training = any(frame.function == "make_rollout_batch" for frame in inspect.stack())
            if is_training and next(after_rollouts) == 12:
                (tmp_path / "slow").touch()
                threading.Timer(0.5, os.killpg, (0, signal.SIGTERM)).start()
            return original(self, *args)

        Worker.call = judge
        try:
            rlad.train(config)
        finally:
            os._exit(77)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 77
    assert not (tmp_path / "run" / "metrics.jsonl").exists(), (
        "the signal came before the first step"
    )
    (tmp_path / "slow").unlink()
    rlad.train(config, resume=True)
    assert remains(tmp_path / "run") == remains(wanted)


# --- two processes --------------------------------------------------------------------------------


def test_of_two_runs_that_begin_at_once_in_one_place_the_later_is_refused(world, tmp_path):
    """The second finds the place free, and while it loads its models the first has made its run
    there."""
    config = run_config(world, tmp_path / "run")
    first: list[dict[str, Any]] = []

    class MeanwhileAnother(rlad.training.reporter.Reporter):
        def phase(self, name: str) -> None:
            if name == "loading models":
                first.append(remains(rlad.train(config).run_dir))

    with pytest.raises(ValueError, match="exists already; use --resume to continue it"):
        rlad.train(config, reporter=MeanwhileAnother())
    assert first == [remains(tmp_path / "run")]
