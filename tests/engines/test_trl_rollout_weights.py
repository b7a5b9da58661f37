"""Rollouts that vLLM sampled, from recorded log-probs: TRL's importance correction beside the
teacher's term."""

import math
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.trl
pytest.importorskip("trl", reason="needs the optional package trl")

from trl.trainer.grpo_trainer import GRPOTrainer

import reference
from rlad.engines.trl.config import AGGREGATION
from trl_runs import (
    distance,
    first_inputs,
    loss_and_gradient,
    make_trainer,
    move,
    nearby,
    rows_of,
    same_rollouts,
    student,
)

CLIP: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.2}
BETA = 0.1
MODES: dict[str, dict[str, Any]] = {
    "token_truncate": {"vllm_importance_sampling_clip_max": 1.1},
    "token_truncate from both sides": {
        "vllm_importance_sampling_clip_min": 0.9,
        "vllm_importance_sampling_clip_max": 1.1,
    },
    "token_mask": {
        "vllm_importance_sampling_clip_min": 0.9,
        "vllm_importance_sampling_clip_max": 1.1,
    },
    "sequence_truncate": {"vllm_importance_sampling_clip_max": 1.1},
    "sequence_mask": {
        "vllm_importance_sampling_clip_min": 0.9,
        "vllm_importance_sampling_clip_max": None,
    },
}
"""TRL's `vllm_importance_sampling_mode` (first word) and the bounds that come with it."""


def recorded_rollouts(prompts: list[str], trainer: Any) -> dict[str, Any]:
    """Completions with the log-probs of a sampler whose weights are a little off; one of them is
    not known."""
    rollouts = same_rollouts(prompts, trainer)
    sampler = nearby(student(), seed=8, distance=0.006)
    rollouts["logprobs"] = []
    for prompt, completion in zip(rollouts["prompt_ids"], rollouts["completion_ids"], strict=True):
        logits = (
            sampler(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
            / trainer.temperature
        )
        chosen = logits.log_softmax(dim=-1).gather(1, torch.tensor(completion)[:, None])[:, 0]
        rollouts["logprobs"].append(chosen.tolist())
    rollouts["logprobs"][0][0] = math.nan
    return rollouts


def trainer_with_recorded_rollouts(folder: Any, mode: str, **settings: Any) -> Any:
    """TRL takes the rollouts for vLLM's; the student has moved since, as after steps on the same
    rollouts."""
    path = folder / "student"
    student().save_pretrained(path)
    trainer = make_trainer(
        folder,
        {"type": "trrd", "alpha": 0.5, **CLIP},
        model=str(path),
        trainer={"teacher": nearby(student()), "rollout_func": recorded_rollouts},
        vllm_importance_sampling_mode=mode.split()[0],
        **MODES[mode] | settings,
    )
    trainer.use_vllm, trainer._last_loaded_step = True, 0
    return trainer


def weights_by_hand(mode: str, old: list[float], sampled: list[float]) -> list[float]:
    """min(max(πold / μ, low), high) of each token or of the completion, or 0 outside of the bounds;
    1 where μ is unknown."""
    low = MODES[mode].get("vllm_importance_sampling_clip_min")
    high = MODES[mode].get("vllm_importance_sampling_clip_max")
    low, high = -math.inf if low is None else low, math.inf if high is None else high
    differences = [0.0 if math.isnan(mu) else o - mu for o, mu in zip(old, sampled, strict=True)]
    if mode.startswith("sequence"):
        differences = [sum(differences)] * len(differences)
    ratios = [math.exp(difference) for difference in differences]
    if "truncate" in mode:
        return [min(max(ratio, low), high) for ratio in ratios]
    return [ratio if low <= ratio <= high else 0.0 for ratio in ratios]


def token_losses_by_hand(
    row: dict[str, list[float]], weights: list[float], advantage: float
) -> list[float]:
    losses = []
    for s, o, t, r, weight in zip(
        row["student"], row["old"], row["teacher"], row["reference"], weights, strict=True
    ):
        # A completion of advantage 0 was never shown to the teacher; its surrogate is 0 whatever
        # that would say.
        surrogate = (
            reference.trrd_token(s, o, t, advantage, alpha=0.5, c=1.0, **CLIP) if advantage else 0.0
        )
        losses.append(weight * surrogate + BETA * reference.kl_token(s, r, "k3"))
    return losses


@pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")
@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
@pytest.mark.parametrize("mode", MODES)
def test_the_weight_is_on_the_surrogate_with_its_teacher_term_and_not_on_the_leash(
    tmp_path, mode, loss_type
):
    trainer = trainer_with_recorded_rollouts(tmp_path, mode, beta=BETA, loss_type=loss_type)
    inputs = first_inputs(trainer)
    move(trainer)
    rows, seen = [], []
    for part in inputs:
        for row, advantage in zip(rows_of(trainer, part), part["advantages"].tolist(), strict=True):
            weights = weights_by_hand(mode, row["old"], row["sampled"])
            rows.append(token_losses_by_hand(row, weights, advantage))
            seen += weights if advantage else []
    bounds = {
        0.0 if "mask" in mode else bound for bound in MODES[mode].values() if bound is not None
    }
    at_bounds = [weight in bounds for weight in seen]
    assert 0.05 < sum(at_bounds) / len(seen) < 0.95 and len(set(seen)) > 3, (
        "the bounds are reached, and not always"
    )
    by_hand = {"sequence_mean": reference.sequence_mean, "token_mean": reference.token_mean}[
        AGGREGATION[loss_type]
    ](rows)
    assert loss_and_gradient(trainer, inputs)[0] == pytest.approx(float(by_hand), abs=2e-6)
    metrics = trainer._metrics["train"]
    assert max(metrics["sampler/mismatch/max"]) == pytest.approx(
        metrics["sampling/sampling_logp_difference/max"][0], rel=1e-5
    )


@pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")
@pytest.mark.parametrize("mode", MODES)
def test_without_teacher_it_is_trls_own_loss_and_gradient(tmp_path, mode):
    trainer = trainer_with_recorded_rollouts(tmp_path, mode, beta=BETA, loss_type="dapo")
    trainer.args.objective = {"type": "grpo", **CLIP}
    trainer.teacher = None
    inputs = first_inputs(trainer)
    move(trainer)
    theirs, ours = (loss_and_gradient(trainer, inputs, of=kind) for kind in (GRPOTrainer, None))
    assert ours[0] == pytest.approx(theirs[0], abs=1e-6) and distance(ours[1], theirs[1]) < 1e-5
    for part in inputs:
        part["importance_sampling_ratio"] = torch.ones_like(part["importance_sampling_ratio"])
    assert distance(loss_and_gradient(trainer, inputs)[1], theirs[1]) > 1e-2, (
        "the comparison can fail"
    )
