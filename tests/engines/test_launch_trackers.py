"""A tracker that fails in one of two processes (gloo on the CPU) ends both with one sentence."""

from pathlib import Path

import pytest

pytestmark = pytest.mark.trl
pytest.importorskip("trl", reason="needs the optional package trl")

import sys  # noqa: E402

from rlad.runs.directory import RunDirectory  # noqa: E402
from started_processes import start_process  # noqa: E402
from tiny_runs import run_config, write_config  # noqa: E402

BREAKS = """
import os
from pathlib import Path


class Run:
    def log(self, figures, step):
        if step == 3 and os.environ["BREAKS"] == "log":
            raise ConnectionError("no route\\nto host")

    def finish(self):
        if os.environ["BREAKS"] == "close":
            raise ConnectionError("no route")


def init(**settings):
    with Path(__file__).with_suffix(".ranks").open("a") as file:
        file.write(os.environ["RANK"])
    if os.environ["BREAKS"] == "start":
        raise PermissionError("not logged in")
    return Run()


Table = dict
"""
STARTS = {
    "launch": (["rlad"], ["--launch", "ddp", "--num-processes", "2"]),
    "torchrun": (["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "rlad"], []),
}
SENTENCES = {
    "start": "tracker 'trackio' cannot start (not logged in); mend that, or leave it out of logging.trackers.",
    "log": "rank 0: tracker 'trackio' failed at step 3 (no route); what the run itself has written is whole: go on with "
    "--resume, without the tracker by logging.trackers=[].",
    "close": "rank 0 of 2: tracker 'trackio' could not be closed (no route); what the run itself has written is whole.",
}


@pytest.mark.parametrize(("start", "breaks"), [("torchrun", "start"), ("launch", "log"), ("launch", "close")])
def test_a_tracker_that_fails_ends_all_ranks(world: Path, tmp_path: Path, start: str, breaks: str):
    """A package of the name `trackio` raises where it is told to; the first rank alone starts it."""
    (tmp_path / "trackio.py").write_text(BREAKS)
    run, (module, flags) = tmp_path / "run", STARTS[start]
    sections = {"engine": {"type": "trl"}, "logging": {"trackers": ["trackio"]}, "student": {"device": "cpu"}}
    config = write_config(tmp_path / "run.toml", run_config(world, run, **sections))
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    environment |= {"PYTHONPATH": str(tmp_path), "BREAKS": breaks}
    process = start_process([sys.executable, "-m", *module, "train", str(config), *flags], environment)
    _, errors = process.communicate(timeout=120)
    ranks = [""] if start == "launch" else ["rank 0 of 2: ", "rank 1 of 2: "]
    said = sorted(line for line in errors.splitlines() if line.startswith("rlad: "))
    assert said == [f"rlad: {rank}{SENTENCES[breaks]}" for rank in ranks], errors
    assert process.returncode == 1
    assert start == "torchrun" or "Traceback" not in errors  # torchrun itself shows one
    assert (tmp_path / "trackio.ranks").read_text() == "0"
    rows = [row["step"] for row in RunDirectory(run).read("metrics.jsonl")]
    assert rows == {"start": [], "log": [1, 2, 3], "close": [1, 2, 3, 4]}[breaks]
    if breaks == "log":
        assert RunDirectory(run).newest_checkpoint()[0] == 3
