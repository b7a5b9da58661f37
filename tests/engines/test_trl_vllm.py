"""`RLADTrainer` with rollouts by the real vLLM, on the CPU, in TRL's mode "colocate".

Needs an environment with vLLM, TRL and rlad (`.ci/vllm-environment`), whose Python
`RLAD_VLLM_PYTHON` names, and TRL here.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest

VLLM_PYTHON = os.environ.get("RLAD_VLLM_PYTHON")
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        not VLLM_PYTHON,
        reason="set RLAD_VLLM_PYTHON to what `.ci/vllm-environment DIRECTORY` prints",
    ),
]
pytest.importorskip("trl", reason="needs the optional package trl")

from test_trl_rollout_weights import BETA, CLIP, MODES, token_losses_by_hand, weights_by_hand

import reference


def mean_distance(rows: list[dict[str, list[float]]], one: str, other: str) -> float:
    distances = [abs(a - b) for row in rows for a, b in zip(row[one], row[other], strict=True)]
    return sum(distances) / len(distances)


def test_vllm_samples_from_the_student_as_it_is_and_its_mismatch_weighs_the_surrogate(tmp_path):
    """Three steps, and a fourth batch of rollouts; vLLM computes in bfloat16, TRL in float32."""
    mode = "token_truncate"
    settings = {
        "objective": {"type": "trrd", "alpha": 0.5, **CLIP},
        "beta": BETA,
        "loss_type": "dapo",
        "max_steps": 3,
    }
    settings |= {"vllm_importance_sampling_mode": mode, **MODES[mode]}
    command = [
        str(VLLM_PYTHON),
        str(Path(__file__).parents[1] / "vllm_rollouts.py"),
        str(tmp_path),
        json.dumps(settings),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    rows = found["rows"]
    assert len(found["logs"]) == 3 and len(rows) == 8
    # The steps moved the student far; vLLM got its new weights each time.
    assert mean_distance(rows, "old", "reference") > 0.5
    assert 0 < mean_distance(rows, "sampled", "old") < 0.1
    assert all(0 < row["sampling/sampling_logp_difference/mean"] < 0.1 for row in found["logs"])
    weights = [weights_by_hand(mode, row["old"], row["sampled"]) for row in rows]
    assert len({weight for row in weights for weight in row}) > len(rows)
    losses = [
        token_losses_by_hand(*each) for each in zip(rows, weights, found["advantages"], strict=True)
    ]
    assert found["loss"] == pytest.approx(reference.token_mean(losses), abs=1e-5)


def run_by_trl(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    program = Path(__file__).parents[1] / "vllm_trl_run.py"
    command = [str(VLLM_PYTHON), str(program), str(folder), *more]
    return subprocess.run(command, capture_output=True, text=True, timeout=900)


def test_every_end_token_of_the_student_ends_a_completion(tmp_path):
    done = run_by_trl(tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    completions = json.loads(done.stdout.splitlines()[-1])
    ended = [one["tokens"] for one in completions if not one["is_truncated"]]
    assert {tokens[-1] for tokens in ended} == {"<eos>", "0"}
    for one in completions:
        assert not {"<eos>", "0"} & set(one["tokens"][:-1])


def test_weights_that_trl_could_not_update_are_refused(tmp_path):
    done = run_by_trl(tmp_path, "packed")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "UserError: engine.trl.use_vllm: on the CPU vLLM keeps packed weights, which TRL" in last
