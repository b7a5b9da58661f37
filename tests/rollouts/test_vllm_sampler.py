"""vLLM as the sampler of a run: what it writes is the student's, after every update.

Needs an environment with vLLM and rlad (`.ci/vllm-environment`), whose Python `RLAD_VLLM_PYTHON`
names.
"""

import json
import math
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import chisquare

VLLM_PYTHON = os.environ.get("RLAD_VLLM_PYTHON")
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        not VLLM_PYTHON,
        reason="set RLAD_VLLM_PYTHON to what `.ci/vllm-environment DIRECTORY` prints",
    ),
]
TESTS = Path(__file__).parents[1]


def found_in(case: str, *arguments: str) -> dict[str, Any]:
    program = str(TESTS / "vllm_samples.py")
    environment = os.environ | {"OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [str(VLLM_PYTHON), program, case, *arguments],
        capture_output=True,
        text=True,
        timeout=900,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("case", "mean", "largest"),
    [
        ("tied", 1e-5, 1e-3),
        ("untied", 1e-5, 1e-3),
        # W + B A in one product rounds otherwise than W x + B (A x).
        ("lora", 1e-4, 1e-2),
        ("bfloat16", 0.1, math.inf),
    ],
)
def test_its_logprobs_are_those_of_the_trainer_after_every_update(
    case: str, mean: float, largest: float
) -> None:
    found = found_in(case)
    assert found["num_tokens"] > 2000
    assert found["mean"] < mean and found["max"] < largest
    # Each completion has a seed of its own.
    assert found["same_seed_same_tokens"] and found["other_seed_other_tokens"]
    # Every group is handed on once, whole, with one completion for each place.
    assert found["handed_on"] == [0, 1, 2]
    for group in found["groups"]:
        assert len(group) == 3
        for one in group:
            *before, last = one["token_ids"]
            assert len(one["logprobs"]) == len(one["token_ids"]) <= 6
            assert not {1, 2} & set(before)  # the end tokens
            assert one["is_truncated"] == (last not in (1, 2))


def test_a_teachers_adapter_in_the_student_is_not_handed_over() -> None:
    found = found_in("frozen_adapter")
    assert found["mean"] < 1e-4


def test_a_call_that_fails_leaves_nothing_behind() -> None:
    found = found_in("limits")
    assert found["different"] == [1, 1, 1]  # the likeliest tokens
    assert "60" not in found["too_long"] and "64 tokens" in found["too_long"]
    assert found["left"] == 0 and found["sizes"] == [3, 3, 3]


def test_stale_weights_stop_the_run() -> None:
    """vLLM 0.32 keeps an old output layer of tied embeddings on the CPU, unless it is packed
    again."""
    error = found_in("without_remedy")["error"]
    assert error.startswith("RunFailedError: vLLM does not sample from the student's weights")
    assert "rollout.engine = 'native'" in error


def test_it_samples_each_token_as_often_as_the_trainer_says() -> None:
    found = found_in("frequencies")
    for counts, probabilities in zip(found["counts"], found["probabilities"], strict=True):
        total = sum(counts)
        # Rare tokens together: the test wants five of each kind.
        common = [i for i, p in enumerate(probabilities) if p * total >= 5]
        seen = [counts[i] for i in common]
        wanted = [probabilities[i] * total for i in common]
        seen.append(total - sum(seen))
        wanted.append(total - sum(wanted))
        assert chisquare(seen, wanted).pvalue > 1e-4


def test_more_prompts_than_it_takes_at_once_are_all_continued() -> None:
    assert found_in("long_prompts")["sizes"] == [8] * 8


def test_what_vllm_cannot_do_is_said_before_the_run_starts() -> None:
    found = found_in("obstacles")
    assert found["fits"] is None
    assert "lost to rounding" in found["bfloat16_lora"]
    assert "other names" in found["experts"]
    assert "heads" in found["heads"] and found["heads"] in found["refused"]
    assert "set it to 'native'" in found["refused"]
    assert found["auto"] == ["native", f"our own decoder: {found['heads']}"]
    assert "max_model_len = 100000" in found["too_long"] and "256" in found["too_long"]
    assert "does not start with student" in found["no_memory"]
    assert "Available memory" in found["no_memory"], "what vLLM says of it"
    assert "give rollout.max_batch_rows and rollout.vllm.max_model_len lower" in found["no_memory"]
    assert "\n" not in found["no_memory"] and "utilization" not in found["no_memory"]


def test_it_sees_pictures_as_the_trainer_does_and_never_writes_a_placeholder() -> None:
    found = found_in("pictures")
    assert found["num_tokens"] > 1000
    assert found["mean"] < 1e-5 and found["max"] < 1e-3
    # The placeholder is likely: a sampler that may draw it does so in 1,000 tokens. The log-probs
    # are those of the whole vocabulary all the same.
    assert found["share_of_placeholder"] > 0.1 and found["drawn"] == []
    assert "servers get only the language part" in found["servers"]
    assert "'mistral3'" in found["unknown"]


def test_a_run_samples_and_evaluates_by_vllm_and_resumes_with_its_rollouts(tmp_path) -> None:
    """Stopped between the two steps on a rollout batch, it takes the second on the same batch."""
    found = found_in("run", str(tmp_path))
    assert found["sampler"] == ["vllm", "vllm"]
    whole, resumed = found["metrics"]
    assert [row["step"] for row in whole] == [row["step"] for row in resumed] == [1, 2, 3, 4]
    for one, other in zip(whole, resumed, strict=True):
        assert one["optimization/loss"] == pytest.approx(other["optimization/loss"], abs=1e-5)
        assert 0 <= one["sampler/kl/mean"] < 1e-6
        assert one["sampler/mismatch/max"] < 1e-3
        assert one["sampler/bounded_weights/frac"] == 0
    assert "time/hand_over/seconds" in whole[2]


def test_a_teacher_that_writes_has_a_vllm_of_its_own(tmp_path: Path) -> None:
    found = found_in("teacher_written", str(tmp_path))
    assert len(found["writer"]) > 100 and max(found["writer"]) < 1e-3
    assert len(found["student"]) > 10 and max(found["student"]) < 1e-3
    assert len(found["losses"]) == 4 and all(map(math.isfinite, found["losses"]))


def test_episodes_are_continued_turn_by_turn() -> None:
    found = found_in("episodes")
    assert max(found["num_turns"]) >= 3
    assert len(found["distances"]) > 100 and max(found["distances"]) < 1e-3
    assert found["same_again"]


def test_it_sleeps_after_the_last_turn_of_a_batch_and_not_between_turns() -> None:
    found = found_in("asleep")
    assert max(found["num_turns"]) > 1
    awake = ["weights", "kv_cache"]
    # The two batches of episodes, single answers, and what closes it.
    assert found["calls"] == ["sleep", "played", *awake, "sleep", "played", *awake, "sleep", "all"]
    assert found["max"] < 1e-3
