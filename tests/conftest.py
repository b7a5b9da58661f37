"""No network, and both cores for the two test workers; the models and problems of tiny runs."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny student, a tiny teacher and files of problems (see `tiny_runs`)."""
    from tiny_runs import write_world

    return write_world(tmp_path_factory.mktemp("world"))
