"""Ranks among themselves, without a run: who does what, whose error it is, who waits for whom; how endings are told."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pytest import approx, raises

from rlad.engines.processes.endings import Ending, conclude
from rlad.engines.processes.ranks import ALONE
from rlad.engines.processes.requirements import require_not_alone_by_mistake, require_same_launch
from rlad.errors import RunFailedError
from tiny_runs import run_config, write_config


def of_two(name: str, folder: Path) -> list[dict[str, Any]]:
    """What both ranks wrote."""
    script = Path(__file__).parents[1] / "rank_work.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script), name]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True, check=False, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_two_ranks_share_work_values_errors_and_signals(tmp_path):
    first, second = of_two("exchange", tmp_path)
    assert (first["shares"], second["shares"]) == ([[0, 1], [0], []], [[2, 3], [1, 2], [0]])
    assert (first["together"], second["together"]) == (0, 10)
    assert first["from first"] == second["from first"] == 5
    assert (first["to first"], second["to first"]) == (["a", "c", "b", "d"], ["b", "d"])
    assert first["largest"] == second["largest"] == {"a": 1.0, "b": 3.0}
    same = {
        "one fails": "ValueError: rank 1: no answer.",
        "all fail": "ValueError: no teacher.",
        "first fails": "ValueError: no teacher.",
        "one stops": "StopRequested: SIGTERM",
        "one stops an update": "StopRequested: SIGTERM",
        "after that": "still here",
    }
    for key, value in same.items():
        assert first[key] == second[key] == value, key


def test_one_process_alone_is_the_same_without_others():
    assert (list(ALONE.share(3)), ALONE.together("work", lambda: 7), ALONE.from_first("work", lambda: 8)) == ([0, 1, 2], 7, 8)
    assert ALONE.to_first("work", [1, 2]) == [1, 2] and ALONE.is_first and ALONE.all_raise(ValueError())


def test_a_timeout_says_who_waits_for_whom_and_for_what(tmp_path):
    first, second = of_two("wait", tmp_path)
    assert "rank 0 of 2 lost another rank at the rollouts of step 3, after 1 s of waiting" in first["error"]
    assert "Ranks 1 failed to pass monitoredBarrier" in first["error"]
    assert second["error"].startswith("RankLostError: rank 1 of 2 lost another rank at the rollouts of step 3")
    assert first["seconds"] < 3


def test_a_split_student_is_whole_while_a_rank_samples_alone(tmp_path):
    """fully_shard on the CPU: ranks make different numbers of forward passes, and hold their half again afterwards."""
    for result in of_two("shard", tmp_path):
        assert result["parts"] == 3 and result["held"] == result["held after"] == approx(0.5, abs=0.05)
        assert result["logits"] < 1e-5
        assert result["norms"][0] == approx(result["norms"][1], rel=1e-4)


@pytest.mark.trl
def test_a_runs_teacher_split_over_two_ranks_scores_as_a_whole_one(world, tmp_path):
    """Ranks ask about different numbers of completions, one in each forward pass."""
    pytest.importorskip("trl", reason="needs the optional package trl")
    engine = {"type": "trl", "trl": {"teacher_is_sharded": True}}
    teacher = {"dtype": "bfloat16", "random_weights": True, "tokens_per_batch": 1}
    write_config(tmp_path / "run.toml", run_config(world, tmp_path / "run", engine=engine, teacher=teacher))
    for rank, result in enumerate(of_two("teacher", tmp_path)):
        assert result["held"] == approx(0.5, abs=0.05)
        assert result["identities"] == [f"{world / 'teacher'} (bfloat16, random weights of seed 0)"] * 2
        assert len(result["whole"]) == 2 + rank
        for ours, theirs in zip(result["split"], result["whole"], strict=True):
            assert ours == approx(theirs, abs=1e-5)


# --- endings ----------------------------------------------------------------------------------------------------------


def test_all_well_and_stopped_by_a_signal_are_exit_codes(tmp_path):
    assert conclude([Ending(0, 0), Ending(1, 0)], tmp_path) == 0
    assert conclude([Ending(0, 130), Ending(1, 130)], tmp_path) == 130


@pytest.mark.parametrize(
    ("endings", "sentence", "is_a_mistake"),
    [
        (
            [Ending(0, 1, "RankLostError", "rank 0 lost another."), Ending(1, -signal.SIGKILL)],
            r"^rank 1 of 2 was ended by SIGKILL \(as the system does when memory runs out\), and the others with it",
            False,
        ),
        (
            [Ending(0, -signal.SIGKILL, was_killed_here=True), Ending(1, -signal.SIGSEGV)],
            "^rank 1 of 2 was ended by SIGSEGV,",
            False,
        ),
        ([Ending(0, 2, "ValueError", "No such task."), Ending(1, 2, "ValueError", "No such task.")], "^No such task.$", True),
        (
            [Ending(0, 1, "RankLostError", "rank 0 lost."), Ending(1, 1, "RunFailedError", "Disk full.")],
            "^rank 1 of 2: Disk full.$",
            False,
        ),
        (
            [Ending(0, 1, "RankLostError", "rank 0 lost."), Ending(1, 1, "KeyError", "'x'")],
            "^rank 1 of 2 failed .KeyError: 'x'.",
            False,
        ),
        (
            [Ending(0, 1, "RankLostError", "rank 0 waited."), Ending(1, 1, "RankLostError", "rank 1 waited.")],
            "^rank 0 waited",
            False,
        ),
    ],
)
def test_the_reason_is_told_and_not_what_followed_from_it(tmp_path, endings, sentence, is_a_mistake):
    with raises(ValueError, match=sentence) as error:
        conclude(endings, tmp_path)
    assert isinstance(error.value, RunFailedError) is not is_a_mistake


def test_an_accelerate_launch_on_the_cpu_that_started_one_process_is_noticed():
    several = ["/usr/bin/python", "/usr/bin/accelerate", "launch", "--cpu", "--num_processes", "2", "-m", "rlad", "train"]
    for command in (several, [*several[:4], "--num-processes=2"]):
        with raises(
            ValueError, match=r"started one process instead of 2, as it always does; use `rlad train RUN.toml --launch"
        ):
            require_not_alone_by_mistake(command)
    for command in ([], ["bash"], [*several[:4], "--num_processes", "1"], ["mpirun", "launch", "--num_processes", "2"]):
        require_not_alone_by_mistake(command)


def test_the_optimisers_state_is_read_by_what_wrote_it(monkeypatch):
    require_same_launch("ddp", 2)
    with raises(ValueError, match=r"^its optimiser state was written by fsdp2 and this is ddp .* go on with --launch fsdp2"):
        require_same_launch("fsdp2", 1)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    require_same_launch("fsdp2", 8)
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    require_same_launch("deepspeed", 1)
    with raises(ValueError, match="DeepSpeed goes on with as many processes as wrote it, 8, and these are 1"):
        require_same_launch("deepspeed", 8)
