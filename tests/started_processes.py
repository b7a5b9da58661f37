"""Processes that a test starts; none of them, nor what they start, outlives it."""

import os
import subprocess

import psutil

_STARTED: list[subprocess.Popen[str]] = []


def start_process(command: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    """With this environment besides our own; `conftest` ends it behind the test."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )
    _STARTED.append(process)
    return process


def end_started() -> None:
    """Kill what still runs, and all that it has started, in whatever session."""
    while _STARTED:
        process = _STARTED.pop()
        if process.poll() is None:
            its_own = psutil.Process(process.pid).children(recursive=True)
            process.kill()
            for child in its_own:
                if child.is_running():
                    child.kill()
            process.communicate()
