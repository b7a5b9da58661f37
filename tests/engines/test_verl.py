"""Our objectives inside the real verl 0.9: value and gradient through verl's own loss, config, Ray
worker, reward manager.

Needs verl in an environment of its own: `$(.ci/verl-environment DIRECTORY) -m pytest -n 0 -m verl
tests/engines/test_verl.py`.
"""

import asyncio
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("verl", reason="verl needs an environment of its own: .ci/verl-environment")
pytestmark = pytest.mark.verl

import hydra
import numpy as np
import ray
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from verl import DataProto
from verl.experimental.reward_loop.reward_loop import migrate_legacy_reward_impl
from verl.trainer.distillation.losses import DISTILLATION_LOSS_REGISTRY, distillation_ppo_loss
from verl.trainer.main_ppo import run_ppo
from verl.trainer.ppo.reward import load_reward_manager
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.utils import tensordict_utils
from verl.utils.config import omega_conf_to_dataclass, validate_config
from verl.utils.dataset.rl_dataset import RLHFDataset
from verl.workers.config import FSDPActorConfig
from verl.workers.utils.losses import ppo_loss

from rlad.config.run import RolloutConfig
from rlad.engines.verl.check import check_verl
from rlad.engines.verl.objective import NAMES, VARIABLE
from rlad.engines.verl.plugin import rlad_loss
from rlad.export.verl import _shell
from rlad.export.verl_command import AGGREGATION
from rlad.models.without_weights import load_tokenizer
from rlad.objectives import token_loss
from rlad.objectives.aggregate import Aggregation, aggregate
from rlad.objectives.inputs import LossInputs
from rlad.rollouts.prompts import prompt_token_ids
from verl_batches import Batch, actor, distillation, micro_batch, sequences, through_verl
from verl_exports import SMALL, export, overrides_of

PROMPTS, RESPONSES = (3, 1, 2, 5, 2, 4), (4, 7, 1, 5, 3, 6)
WIDTH = max(RESPONSES)
NUM_ROWS = len(RESPONSES)
SECTIONS: dict[str, list[dict[str, Any]]] = {
    **{name: [{}] for name in NAMES},
    "trrd": [{}, {"teacher_log_ratio_clip": "off"}, {"alpha": 0.2, "dual_clip": 1.5}],
    "kdrl": [{"kd_coef": 0.1}, {"kd_coef": 0.1, "kd_estimator": "k3"}],
    "rlsd": [{"teacher_weight": 0.5}],
}
CASES = [(name, section) for name, sections in SECTIONS.items() for section in sections]
LENGTHS = torch.tensor(RESPONSES)
INSIDE = torch.arange(WIDTH)[None, :] < LENGTHS[:, None]


@pytest.fixture
def batch() -> Batch:
    """Padded `[row, token]` tensors in float64; garbage behind the end of each response; one token
    inside is not trained."""
    generator = torch.Generator().manual_seed(4)

    def logprobs() -> Tensor:
        return -torch.rand(NUM_ROWS, WIDTH, generator=generator, dtype=torch.float64) * 3

    student = logprobs()
    mask = INSIDE.clone()
    mask[1, 2] = False
    near = {"old": 0.3, "reference": 0.5, "teacher": 2.0}
    others = {
        name: student + width * torch.randn(student.shape, generator=generator)
        for name, width in near.items()
    }
    advantages = (
        torch.randn(NUM_ROWS, 1, generator=generator, dtype=torch.float64).expand(-1, WIDTH)
        * INSIDE
    )
    weights = torch.rand(student.shape, generator=generator, dtype=torch.float64) + 0.5
    tensors = {
        "student": student,
        "mask": mask,
        "advantages": advantages,
        "weights": weights * mask,
        **others,
    }
    return {"prompts": PROMPTS, "responses": RESPONSES, **tensors}


def ours(
    batch: Batch, name: str, section: dict[str, Any], mode: Aggregation
) -> tuple[float, Tensor, dict[str, Tensor]]:
    """The same batch in one piece through our objective and our aggregation."""
    student = batch["student"].clone().requires_grad_()
    inputs = LossInputs(student, batch["old"], batch["advantages"], batch["mask"], batch["teacher"])
    knobs = {key: None if value == "off" else value for key, value in section.items()}
    losses, stats = token_loss(name, inputs, knobs=knobs)
    loss = aggregate(losses, batch["mask"], mode=mode, max_completion_tokens=WIDTH)
    loss.backward()
    assert student.grad is not None
    return float(loss.detach()), student.grad, stats


WHOLE = [[list(range(NUM_ROWS))]]
UNEQUAL = [[[2], [0, 5, 1], [3, 4]]]
TWO_RANKS = [[[0, 1, 2]], [[3, 5, 4]]]
TWO_RANKS_UNEQUAL = [[[4], [1, 0]], [[3, 2], [5]]]


@pytest.mark.parametrize(
    "split",
    [WHOLE, UNEQUAL, TWO_RANKS, TWO_RANKS_UNEQUAL],
    ids=["whole", "micro", "dp2", "dp2-micro"],
)
@pytest.mark.parametrize("mode", list(AGGREGATION))
@pytest.mark.parametrize(("name", "section"), CASES)
def test_value_and_gradient_are_those_of_the_objective(
    batch, monkeypatch, name, section, mode, split
):
    monkeypatch.setenv(VARIABLE, json.dumps({"type": name, **section}))
    settings = {"loss_scale_factor": WIDTH} if mode == "constant_length" else {}
    loss, gradient, metrics = through_verl(batch, name, actor(AGGREGATION[mode], **settings), split)
    wanted, wanted_gradient, stats = ours(batch, name, section, mode)
    assert loss == pytest.approx(wanted, rel=1e-7)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-7, atol=1e-12)
    assert wanted_gradient.abs().max() > 1e-3
    trained = batch["mask"].sum()
    assert set(metrics) == {f"rlad/{stat}/mean" for stat in stats}
    for stat, values in stats.items():
        assert metrics[f"rlad/{stat}/mean"] == pytest.approx(
            float(values[batch["mask"]].sum() / trained), rel=1e-5, abs=1e-6
        )


def test_padded_batches_give_the_same(batch, monkeypatch):
    monkeypatch.setenv(VARIABLE, '{"type": "trrd"}')
    # Without a KL leash its kind does not matter.
    config = actor("seq-mean-token-mean", use_kl_loss=False, kl_loss_type="kl")
    jagged, gradient, _ = through_verl(batch, "trrd", config, UNEQUAL)
    padded, padded_gradient, _ = through_verl(batch, "trrd", config, UNEQUAL, padded=True)
    assert padded == pytest.approx(jagged, rel=1e-12)
    torch.testing.assert_close(padded_gradient, gradient, rtol=1e-12, atol=0)


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
def test_alpha_1_is_verl_s_own_grpo_with_leash_and_rollout_weights(batch, monkeypatch, mode):
    """verl's loss without a teacher adds KL leash and weights itself: those that our route adds
    must be the same."""
    monkeypatch.setenv(
        VARIABLE, json.dumps({"type": "trrd", "alpha": 1.0, "clip_low": 0.1, "clip_high": 0.3})
    )
    clip = {"clip_ratio": 0.1, "clip_ratio_low": 0.1, "clip_ratio_high": 0.3, "clip_ratio_c": 1e9}
    config = actor(mode, use_kl_loss=True, kl_loss_coef=0.2, **clip)
    loss, gradient, _ = through_verl(batch, "trrd", config, UNEQUAL)
    student = batch["student"].clone().requires_grad_()
    rows = list(range(NUM_ROWS))
    wanted, _ = ppo_loss(
        config, {"log_probs": sequences(batch, student, rows)}, micro_batch(batch, rows, dp_size=1)
    )
    wanted.backward()
    assert loss == pytest.approx(float(wanted.detach()), rel=1e-7)
    torch.testing.assert_close(gradient, student.grad, rtol=1e-7, atol=1e-12)


def test_leash_and_weights_matter(batch, monkeypatch):
    """The test above would not see a term that both leave out."""
    monkeypatch.setenv(VARIABLE, '{"type": "trrd"}')
    rows = list(range(NUM_ROWS))

    def loss(config: FSDPActorConfig, drop: str) -> float:
        data = micro_batch(batch, rows, dp_size=1, drop=drop)
        return float(
            distillation_ppo_loss(
                config,
                distillation("trrd"),
                {"log_probs": sequences(batch, batch["student"], rows)},
                data,
            )[0]
        )

    plain = loss(actor("token-mean"), "rollout_is_weights")
    kl = (batch["reference"] - batch["student"])[batch["mask"]]
    leash = 0.2 * float((kl.exp() - kl - 1).mean())
    assert loss(
        actor("token-mean", use_kl_loss=True, kl_loss_coef=0.2), "rollout_is_weights"
    ) == pytest.approx(plain + leash)
    assert abs(loss(actor("token-mean"), "") - plain) > 1e-3


def test_a_token_that_the_teacher_left_out_counts_and_has_no_loss(batch, monkeypatch):
    monkeypatch.setenv(VARIABLE, '{"type": "trrd"}')
    batch["teacher"][0, 1] = float("nan")
    loss, gradient, metrics = through_verl(batch, "trrd", actor("token-mean"), TWO_RANKS)
    assert torch.isfinite(gradient).all() and gradient[0, 1] == 0 and np.isfinite(loss)
    assert metrics["rlad/dropped/mean"] == pytest.approx(1 / int(batch["mask"].sum()))


@pytest.mark.parametrize(
    ("settings", "own", "drop", "sentence"),
    [
        (
            {},
            {},
            "teacher_logprobs",
            "objective 'trrd' of rlad needs teacher_logprobs, which verl's batch does not have; "
            "enable distillation.",
        ),
        ({"use_kl_loss": True}, {}, "ref_log_prob", "needs ref_log_prob, which verl's batch"),
        (
            {"use_kl_loss": True, "kl_loss_type": "kl"},
            {},
            "",
            "kl_loss_type: kl; for objective 'trrd' of rlad it must be low_var_kl.",
        ),
        (
            {"entropy_coeff": 0.1},
            {},
            "",
            "actor_rollout_ref.actor.entropy_coeff: 0.1; for objective 'trrd'",
        ),
        (
            {},
            {"use_task_rewards": True},
            "",
            "distillation.distillation_loss.use_task_rewards: True",
        ),
        (
            {},
            {"use_policy_gradient": True},
            "",
            "distillation.distillation_loss.use_policy_gradient: True",
        ),
        ({}, {"loss_max_clamp": 10.0}, "", "distillation.distillation_loss.loss_max_clamp: 10.0"),
    ],
)
def test_settings_without_meaning_are_refused(batch, monkeypatch, settings, own, drop, sentence):
    monkeypatch.setenv(VARIABLE, '{"type": "trrd"}')
    data = micro_batch(batch, [0, 1], dp_size=1, drop=drop)
    with pytest.raises(ValueError) as caught:
        rlad_loss(
            actor("token-mean", **settings),
            distillation("trrd", **own),
            {"log_probs": sequences(batch, batch["student"], [0, 1])},
            data,
        )
    assert sentence in str(caught.value)


def test_a_temperature_at_which_the_teacher_did_not_score_is_refused(batch, monkeypatch):
    monkeypatch.setenv(VARIABLE, '{"type": "trrd"}')
    data = micro_batch(batch, [0, 1], dp_size=1)
    tensordict_utils.assign_non_tensor(data, temperature=0.5)
    with pytest.raises(
        ValueError,
        match=r"rollout.temperature: \{0.5\}; for objective 'trrd' of rlad it must be \{1.0\}",
    ):
        rlad_loss(
            actor("token-mean"),
            distillation("trrd"),
            {"log_probs": sequences(batch, batch["student"], [0, 1])},
            data,
        )


# --- registration ---------------------------------------------------------------------------------


def test_verl_knows_the_names():
    assert all(DISTILLATION_LOSS_REGISTRY[name] is rlad_loss for name in NAMES)
    [finding] = check_verl()
    assert finding.level == "ok" and "knows trrd, kdrl" in finding.message


def test_the_check_sees_a_plugin_that_verl_did_not_load(monkeypatch):
    monkeypatch.setenv("VERL_USE_EXTERNAL_PLUGINS", "none")
    [finding] = check_verl()
    assert finding.level == "error" and finding.message.startswith("verl does not know trrd, kdrl")


def test_a_verl_that_hangs_is_one_sentence(monkeypatch):
    monkeypatch.setattr("rlad.engines.verl.check._TIMEOUT_SECONDS", 0.01)
    [finding] = check_verl()
    assert finding.level == "error" and finding.message.startswith("importing verl took over 0.01")


# --- the exported command -------------------------------------------------------------------------


def composed(command: Path, *more: str) -> DictConfig:
    """The config that verl's main makes of the exported command."""
    with hydra.initialize_config_module("verl.trainer.config", version_base=None):
        return hydra.compose("ppo_trainer", overrides=[*overrides_of(command), *more])


@pytest.mark.parametrize(
    "changes",
    [
        (),
        (
            "optimization.kl_coef=0.01",
            "optimization.aggregation=constant_length",
            "student.dtype=bfloat16",
        ),
        (
            "objective=rlsd",
            "objective.teacher_weight=0.5",
            "optimization.steps_per_rollout_batch=2",
        ),
        ("objective=opd", "optimization.schedule=cosine", "optimization.warmup_steps=2"),
        ("objective=grpo",),
    ],
)
def test_verl_accepts_the_config(tmp_path, changes):
    config = composed(export(tmp_path / "out", *SMALL, *changes))
    validate_config(config, need_reference_policy(config), need_critic(config))
    settings: Any = omega_conf_to_dataclass(config.distillation)
    actor_settings: Any = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    given = {change.split("=", 1)[0]: change.split("=", 1)[1] for change in changes}
    assert settings.enabled == (given.get("objective") != "grpo")
    if settings.enabled:
        assert settings.distillation_loss.loss_mode == given.get("objective", "trrd")
        assert settings.distillation_loss.loss_settings.use_estimator
        assert list(settings.teacher_models) == ["default"]
    assert actor_settings.use_kl_loss == ("optimization.kl_coef" in given)
    assert actor_settings.optim.lr_scheduler_type == given.get("optimization.schedule", "constant")


@pytest.mark.parametrize(
    "text", ["q\"uo'te", "back\\slash", "end\\", 'both\\"', "two\nlines", "null"]
)
def test_texts_reach_verl_as_they_are(text):
    word = subprocess.run(["bash", "-c", f"printf %s {_shell('+a', text)}"], capture_output=True)
    override = OverridesParser.create().parse_override(word.stdout.decode())
    assert override.value() == text


def test_the_objective_reaches_a_real_ray_worker(tmp_path):
    """verl's own `run_ppo` starts Ray from the exported config; the worker sees names, knobs and a
    loss."""
    config = composed(
        export(tmp_path / "out", *SMALL, "objective.alpha=0.25"),
        "ray_kwargs.ray_init.num_cpus=1",
        "+ray_kwargs.ray_init.include_dashboard=False",
        "+ray_kwargs.ray_init._node_ip_address=127.0.0.1",
        f"trainer.default_local_dir='{tmp_path / 'worker.json'}'",
    )

    @ray.remote(num_cpus=1)
    class Worker:
        def run(self, config: DictConfig) -> None:
            from verl.trainer.distillation.losses import DISTILLATION_LOSS_REGISTRY

            from rlad.engines.verl.objective import objective_knobs_from_environment

            seen = {
                name: function.__module__ for name, function in DISTILLATION_LOSS_REGISTRY.items()
            }
            answer = {
                "pid": os.getpid(),
                "seen": seen,
                "knobs": objective_knobs_from_environment("trrd"),
            }
            Path(config.trainer.default_local_dir).write_text(json.dumps(answer))

    try:
        run_ppo(config, task_runner_class=Worker)
    finally:
        ray.shutdown()
    answer = json.loads((tmp_path / "worker.json").read_text())
    assert answer["pid"] != os.getpid() and VARIABLE not in os.environ
    assert {name: answer["seen"].get(name) for name in NAMES} == dict.fromkeys(
        NAMES, "rlad.engines.verl.plugin"
    )
    assert answer["knobs"]["alpha"] == 0.25 and answer["knobs"]["teacher_log_ratio_clip"] == 1.0


def test_verl_s_data_set_and_reward_manager_judge_real_items(tmp_path):
    command = export(tmp_path / "out", *SMALL)
    config = migrate_legacy_reward_impl(composed(command))
    tokenizer = load_tokenizer("embedded/student")
    tokenizer.chat_template = config.actor_rollout_ref.model.custom_chat_template
    items = RLHFDataset(str(command.with_name("train.parquet")), tokenizer, config.data)
    assert len(items) == 3 * 4

    async def rewards(completions: list[str]) -> list[dict[str, Any]]:
        manager = load_reward_manager(config, tokenizer)
        return [
            await manager.run_single(as_proto(items[i], text)) for i, text in enumerate(completions)
        ]

    def as_proto(item: dict[str, Any], completion: str) -> DataProto:
        ids = torch.tensor([tokenizer(completion, add_special_tokens=False)["input_ids"]])
        names = ("data_source", "reward_model", "extra_info")
        return DataProto.from_dict(
            tensors={
                "responses": ids,
                "attention_mask": torch.ones(1, ids.shape[1] + 2, dtype=torch.long),
            },
            non_tensors={name: np.array([item[name]], dtype=object) for name in names},
        )

    truths = [items[i]["reward_model"]["ground_truth"] for i in range(4)]
    right = asyncio.run(rewards([f"Answer: {truth}" for truth in truths]))
    assert [answer["reward_score"] for answer in right] == [1.0] * 4
    wrong = asyncio.run(rewards(["no idea"] * 4))
    assert [answer["reward_score"] for answer in wrong] == [0.0] * 4
    assert wrong[0]["reward_extra_info"] == {"score": 0.0, "acc": 0.0}
    prompt = tokenizer.apply_chat_template(
        items[0]["raw_prompt"], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert ids == prompt_token_ids(
        load_tokenizer("embedded/student"), items[0]["raw_prompt"][0]["content"], RolloutConfig()
    )
    assert OmegaConf.select(config, "reward.custom_reward_function.reward_kwargs.config") == str(
        command.with_name("config.toml")
    )
