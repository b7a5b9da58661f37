"""No network, and both cores for the two test workers; the models and problems of tiny runs."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    from started_processes import end_started

    yield
    end_started()


@pytest.fixture(autouse=True)
def same_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fetching a model switches progress bars on for its process; the tests that come after have
    none."""
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", os.environ["HF_HUB_DISABLE_PROGRESS_BARS"])


@pytest.fixture(scope="session", autouse=True)
def can_be_interrupted() -> Iterator[None]:
    """Ctrl-C reaches the programs that tests start, also where a shell has the tests themselves
    ignore it (`pytest &`)."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny student, a tiny teacher and files of problems (see `tiny_runs`)."""
    from tiny_runs import write_world

    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`poison(3, 4)`: the batches of steps 3 and 4 of the runs that follow are poisoned (see
    `poisoned`)."""
    from poisoned import poison_engines

    return poison_engines(monkeypatch)
