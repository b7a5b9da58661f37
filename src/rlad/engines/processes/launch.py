"""`rlad train --launch`: starts the ranks of a run on this machine, passes signals on, and says what ended them.

torchrun's agent is left out: it ends all ranks as soon as one has ended, which would cut short the checkpoint that they write
after Ctrl-C. What a rank dies of is read from the error files of torch elastic.
"""

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

from rlad.config.run import RunConfig
from rlad.engines.processes.endings import ERROR_FILE, LAUNCHED, Ending, conclude
from rlad.engines.processes.requirements import num_ranks, require_devices, require_divisible, require_several, uses_gpus
from rlad.errors import EXIT_SIGNAL

LAUNCHES = ("ddp", "fsdp2", "deepspeed")
GRACE_SECONDS = 10.0
"""How long the other ranks have to end by themselves once one has ended badly."""
_POLL_SECONDS = 0.1
_LOCAL = "127.0.0.1"


def config_file(kind: str) -> Path:
    """The configuration for `accelerate launch --config_file` that `--launch` uses too."""
    return Path(__file__).parent / "accelerate_configs" / f"{kind}.yaml"


def launch(config: RunConfig, arguments: Sequence[str], *, kind: str, number: int | None, port: int | None) -> int:
    """Run `rlad train ARGUMENTS` in `number` processes to their end; returns the exit code, says what went wrong.

    Raises `ValueError` for what cannot be started, and the error of a rank that failed.
    """
    number = _number(config, number)
    require_launchable(config, kind, number)
    environment = environment_of(config, kind, number, _free_port(port))
    with TemporaryDirectory() as folder:
        errors = [Path(folder) / f"rank-{rank}.json" for rank in range(number)]
        command = [sys.executable, "-m", "rlad", "train", *arguments]

        def start() -> list[subprocess.Popen[Any]]:
            return [
                subprocess.Popen(
                    command,
                    env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank), ERROR_FILE: str(error)},
                    start_new_session=True,  # Ctrl-C comes through us alone
                )
                for rank, error in enumerate(errors)
            ]

        with passing_signals_on(start) as (processes, signals):
            killed = wait_for_all(processes, signals)
        return conclude(
            [
                Ending.of(rank, process.returncode, error, was_killed_here=rank in killed)
                for rank, (process, error) in enumerate(zip(processes, errors, strict=True))
            ],
            config.directory,
        )


def require_launchable(config: RunConfig, kind: str, number: int) -> None:
    """`ValueError` unless `number` processes of this kind can be started here for this run."""
    if num_ranks() > 1:
        raise ValueError(f"--launch starts processes, and this is already one of {num_ranks()}; leave it out under torchrun.")
    if number < 1:
        raise ValueError(f"--num-processes is {number}; give at least 1.")
    require_several(config, "--launch starts several")
    require_divisible(config, number)
    require_devices(config, kind, number)
    if kind == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        raise ValueError("--launch deepspeed needs DeepSpeed, which is not installed; install it with: pip install deepspeed.")


def environment_of(config: RunConfig, kind: str, number: int, port: int) -> dict[str, str]:
    """What every rank is told; of FSDP2 and DeepSpeed what accelerate makes of the configuration that is shipped."""
    meeting = {"MASTER_ADDR": _LOCAL, "MASTER_PORT": str(port), "WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number)}
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // number)))}
    own = meeting | threads | {LAUNCHED: "1"}
    if not uses_gpus(config):
        return dict(os.environ) | {"ACCELERATE_USE_CPU": "true"} | own
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    given = accelerate_arguments(kind, number, port)
    made = prepare_deepspeed_cmd_env(given)[1] if kind == "deepspeed" else prepare_multi_gpu_env(given)
    return made | own


def accelerate_arguments(kind: str, number: int, port: int) -> Namespace:
    """The shipped configuration as accelerate's own parser reads it."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    defaults: Any
    given = ["--config_file", str(config_file(kind)), "--num_processes", str(number), "--main_process_port", str(port)]
    arguments, defaults, _ = _validate_launch_command(launch_command_parser().parse_args([*given, "-m", "rlad"]))
    if kind == "deepspeed":  # as `accelerate launch` does behind its validation
        arguments.deepspeed_fields_from_accelerate_config = ",".join([*defaults.deepspeed_config, "mixed_precision"])
    return arguments


def _number(config: RunConfig, number: int | None) -> int:
    if number is not None:
        return number
    if not uses_gpus(config):
        raise ValueError("--launch on the CPU does not know how many processes are wanted; add --num-processes 2, say.")
    import torch

    return torch.cuda.device_count()


def _free_port(port: int | None) -> int:
    """`port`, if nobody listens there, or any free one. `ValueError` when it is taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_LOCAL, port or 0))
        except (OSError, OverflowError) as error:
            raise ValueError(
                f"--port {port} cannot be used ({error}); give another one, or leave it out for a free one."
            ) from None
        return probe.getsockname()[1]


def wait_for_all(processes: Sequence["subprocess.Popen[Any]"], signals: Sequence[int]) -> set[int]:
    """Until all have ended; once one has ended badly, until the others have, or have had their time. Who was killed then.

    After one signal an end by it is a good one: the others may still write the checkpoint.
    """

    def is_bad(code: int | None) -> bool:
        return code not in (None, 0) and (code < EXIT_SIGNAL or len(signals) > 1)

    while any(process.poll() is None for process in processes) and not any(is_bad(process.poll()) for process in processes):
        time.sleep(_POLL_SECONDS)
    last = time.monotonic() + GRACE_SECONDS
    while any(process.poll() is None for process in processes) and time.monotonic() < last:
        time.sleep(_POLL_SECONDS)
    left = {rank for rank, process in enumerate(processes) if process.poll() is None}
    for rank in left:
        os.killpg(processes[rank].pid, signal.SIGKILL)
        processes[rank].wait()
    return left


@contextmanager
def passing_signals_on(
    start: Callable[[], list["subprocess.Popen[Any]"]],
) -> Iterator[tuple[Sequence["subprocess.Popen[Any]"], Sequence[int]]]:
    """What asks this process to stop asks the ranks, which stop together at the next safe point; twice stops them at once.

    Gives the ranks, and the signals passed on so far; those that come while they start wait until all have started.
    """
    processes: list[subprocess.Popen[Any]] = []
    waiting: list[int] = []
    signals: list[int] = []

    def pass_on() -> None:
        while processes and waiting:
            signals.append(waiting.pop(0))
            for process in processes:
                if process.poll() is None:
                    process.send_signal(signals[-1])

    def remember(number: int, frame: FrameType | None) -> None:
        waiting.append(number)
        pass_on()

    # One that is ignored, as SIGHUP under nohup, stays so here and in the ranks.
    caught = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]
    former = {number: signal.signal(number, remember) for number in caught}
    try:
        processes += start()
        pass_on()
        yield processes, signals
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
