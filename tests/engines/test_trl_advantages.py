"""Advantages of the native engine in TRL's trainer: of an evaluation, and settings of TRL's own that they leave out."""

from typing import Any

import pytest
import torch

pytestmark = pytest.mark.trl
trl = pytest.importorskip("trl", reason="needs the optional package trl")

from datasets import Dataset  # noqa: E402

from rlad.engines.trl.config import RLADConfig  # noqa: E402
from trl_runs import make_trainer, prompts  # noqa: E402


def test_those_of_an_evaluation_go_by_its_own_batch_and_groups(tmp_path):
    """16 completions in pairs, where training has 8 in groups of 4; two reward functions share a name."""
    given: list[list[float]] = []

    def judge(completions: list[str], **columns: Any) -> list[float]:
        given.append([(5 * i) ** 2 % 7 * 3.0 ** len(given) for i in range(len(completions))])
        return given[-1]

    held_out = {"eval_dataset": Dataset.from_dict({"prompt": prompts(8)})}
    arguments = {
        "per_device_eval_batch_size": 16,
        "num_generations_eval": 2,
        "reward_weights": [1.0, 0.5],
        "advantages": "rlad",
    }
    trainer = make_trainer(tmp_path, "trrd", trainer=held_out, reward=[judge, judge], **arguments)
    trainer.model.eval()
    batch = trainer._generate_and_score_completions(next(iter(trainer.get_eval_dataloader())))
    rewards = torch.tensor(given[0]) + 0.5 * torch.tensor(given[1])
    half = (rewards[0::2] - rewards[1::2]) / 2
    assert len(half) == 8 and half.count_nonzero() >= 6
    expected = torch.stack([half, -half], dim=1) / (half.abs() + 1e-4)[:, None]
    torch.testing.assert_close(batch["advantages"], expected.flatten())
    assert list(trainer._logs["rewards"]["judge"]) == given[1][8:]  # as long as TRL keeps it


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("scale_rewards", "batch", "divide by a deviation within the group; use 'group' or 'none', or advantages = 'trl'"),
        ("multi_objective_aggregation", "normalize_then_sum", "compare weighted sums of rewards; use 'sum_then_normalize', or"),
        ("num_generations_eval", 1, "compare completions of one prompt; use at least 2, or"),
    ],
)
def test_what_they_leave_out_is_refused_in_one_sentence(tmp_path, name, value, sentence):
    with pytest.raises(ValueError, match=f"^{name} = {value!r} does not fit advantages = 'rlad', which {sentence}.*[.]$"):
        RLADConfig(str(tmp_path), use_cpu=True, advantages="rlad", **{name: value})
    assert getattr(RLADConfig(str(tmp_path), use_cpu=True, **{name: value}), name) == value
