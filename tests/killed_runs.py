"""Runs that are killed by SIGKILL in a known phase, resumed, killed again, and compared with one
that was left alone."""

import math
import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.sharedctypes import RawArray
from pathlib import Path
from typing import Any

import rlad
import rlad.engines.native.batches
import rlad.training.run
from rlad.engines.native.loop import NativeEngine
from rlad.runs.directory import RunDirectory
from tiny_runs import remains

# Phase -> the function that it is the time of. What is within another one, such as sampling in an
# evaluation, counts as that.
PHASES: dict[str, tuple[Any, str]] = {
    "loading": (rlad.training.run, "load_engine_student"),
    "generation": (rlad.engines.native.batches, "graded_groups"),
    "teacher scoring": (NativeEngine, "_ask_teacher"),
    "update": (NativeEngine, "update"),
    "checkpoint writing": (RunDirectory, "write_checkpoint"),
    "evaluation": (rlad.training.run.Training, "_evaluate"),
}
REST = "between"


@dataclass(frozen=True)
class Kill:
    """Where a kill fell, and the last step that the run had recorded then."""

    phase: str
    step: int


class Phases:
    """What a forked process is doing, how often it has begun each phase, and how long they took: in
    memory shared with it."""

    def __init__(self) -> None:
        self.names = [REST, *PHASES]
        self._now = RawArray("i", 1)
        self._begun, self._seconds = RawArray("i", len(self.names)), RawArray("d", len(self.names))

    @property
    def now(self) -> str:
        return self.names[self._now[0]]

    def num_begun(self, phase: str) -> int:
        return self._begun[self.names.index(phase)]

    def mean_seconds(self, phase: str) -> float:
        return self._seconds[self.names.index(phase)] / max(self.num_begun(phase), 1)

    def watch(self) -> None:
        """Of this process, from now on."""
        for name, (owner, function) in PHASES.items():
            setattr(
                owner, function, self._watched(getattr(owner, function), self.names.index(name))
            )

    def _watched(self, function: Callable[..., Any], number: int) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            before, started = self._now[0], time.monotonic()
            if before:
                return function(*args, **kwargs)
            self._now[0] = number
            self._begun[number] += 1
            try:
                return function(*args, **kwargs)
            finally:
                self._now[0] = before
                self._seconds[number] += time.monotonic() - started

        return watched


def start(config: dict[str, Any], phases: Phases) -> int:
    """A fork that begins a run or goes on with it; its process id."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        phases.watch()
        rlad.train(config, resume=RunDirectory(Path(config["run_dir"])).exists())
        code = 0
    finally:
        os._exit(code)


def finish(config: dict[str, Any]) -> Phases:
    """Run to the end, undisturbed."""
    phases = Phases()
    assert os.waitpid(start(config, phases), 0)[1] == 0, "the run failed"
    return phases


def kill(config: dict[str, Any], phase: str, *, occurrence: int, delay: float) -> Kill | None:
    """Go on with a run and kill it so long after it has begun a phase for so many times; None if it
    ended before.

    When the phase was shorter than that, the next one of its kind is waited for.
    """
    phases = Phases()
    process = start(config, phases)
    due = math.inf
    while time.monotonic() < due or phases.now != phase:
        if time.monotonic() >= due:
            due, occurrence = math.inf, phases.num_begun(phase) + 1
        elif due == math.inf and phases.num_begun(phase) >= occurrence:
            due = time.monotonic() + delay
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            assert status == 0, "the run failed"
            return None
        time.sleep(0.0002)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    run = RunDirectory(Path(config["run_dir"]))
    return Kill(phases.now, max((row["step"] for row in run.read("metrics.jsonl")), default=0))


def kill_and_compare(
    make_config: Callable[[Path, int], dict[str, Any]],
    folder: Path,
    *,
    phases: Sequence[str],
    seed: int,
) -> Iterator[tuple[int, list[Kill], list[str]]]:
    """Kill runs at random moments of these phases, in a random order, until each has had its turn.

    `make_config(run_dir, seed)` is asked for another run when one has come to its end. Of each run:
    its seed, the kills it survived, and what differs from the same run left alone: empty when they
    are equal bit for bit.
    """
    chance, left = random.Random(seed), list(phases)
    chance.shuffle(left)
    while left:
        number = seed + len(phases) - len(left)
        wanted, config = (
            make_config(folder / f"{number}-{kind}" / "run", number) for kind in ("alone", "killed")
        )
        durations, kills = finish(wanted), []
        while left:
            delay = chance.uniform(0, durations.mean_seconds(left[-1]))
            occurrence = 1 if left[-1] == "loading" else chance.randint(1, 3)
            fell = kill(config, left[-1], occurrence=occurrence, delay=delay)
            if fell is None:
                break
            kills.append(fell)
            left.pop()
        finish(config)
        yield number, kills, differences(Path(config["run_dir"]), Path(wanted["run_dir"]))


def differences(found: Path, wanted: Path) -> list[str]:
    """The files (of checkpoints, without what they say of time) that are not equal bit for bit."""
    here, there = remains(found), remains(wanted)
    return [
        name for name in sorted(here.keys() | there.keys()) if here.get(name) != there.get(name)
    ]
