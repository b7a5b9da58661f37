"""TRL's own GRPO on problems with pictures against `grpo` of the native engine: the same rollouts
of a tiny LLaVA, and everything else of its own."""

from typing import Any

import pytest

pytestmark = pytest.mark.trl
pytest.importorskip("trl", reason="needs the optional package trl")

import torch
from datasets import Dataset
from trl.data_utils import prepare_multimodal_messages

from rlad.config.run import RunConfig
from rlad.engines.metrics import TokenStats
from rlad.engines.native.loop import NativeEngine
from rlad.models.language_part import freeze_vision
from rlad.models.pictures import MARKER
from tiny_vision import Looking, tiny_processor, tiny_seeing_model
from trl_runs import distance, first_inputs, loss_and_gradient, make_trainer

TEMPLATE = (
    "{% for message in messages %}{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}{% if part.type == 'image' %}<image>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
)
ROLLOUT: dict[str, Any] = {
    "prompts_per_batch": 4, "group_size": 4, "max_completion_tokens": 8, "temperature": 0.7
}  # fmt: skip


def student(train_vision: bool) -> Any:
    model = tiny_seeing_model("llava")
    model.tokenizer.chat_template = TEMPLATE
    assert model.vision is not None
    model.vision.keeps_features = not train_vision
    if not train_vision:
        freeze_vision(model.model)
    return model


def native_engine(aggregation: str, train_vision: bool) -> NativeEngine:
    config = RunConfig.model_validate(
        {
            "student": {"model": "tiny", "train_vision": train_vision},
            "task": {"type": "scenes"},
            "objective": {"type": "grpo", "clip_low": 0.2, "clip_high": 0.28},
            "rollout": ROLLOUT,
            "optimization": {
                "aggregation": aggregation, "advantage_scale": "none", "tokens_per_batch": 200,
                # So that the log-probs of the old policy are kept.
                "steps_per_rollout_batch": 2,
            },
        }
    )  # fmt: skip
    return NativeEngine(config, student=student(train_vision), task=Looking())


def pictured_rows(batch: Any) -> Dataset:
    """TRL wants a conversation and puts the pictures before its text."""
    texts = [group.prompt.replace(MARKER, "").strip() for group in batch.groups]
    return Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": text}] for text in texts],
            "images": [[one.image() for one in g.problem.images] for g in batch.groups],
        }
    )


@pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")
@pytest.mark.parametrize(
    ("aggregation", "loss_type", "train_vision"),
    [
        ("sequence_mean", "grpo", False),
        ("token_mean", "dapo", True),
        ("constant_length", "dr_grpo", False),
    ],
)
def test_trls_own_grpo_has_the_same_loss_and_gradient(
    tmp_path, aggregation, loss_type, train_vision
):
    """With a student that has moved since it sampled: TRL scores the old policy itself, with the
    pixels of its own processor."""
    engine = native_engine(aggregation, train_vision)
    batch = engine.make_rollout_batch(0)
    assert {rollout.verdict for rollout in batch.rollouts} == {"correct", "wrong"}
    rollouts = {
        "prompt_ids": list(map(list, batch.prompts)),
        "completion_ids": list(map(list, batch.completions)),
        "logprobs": [list(one.completion.logprobs) for one in batch.rollouts],
    }
    theirs = student(train_vision)
    processor = tiny_processor("llava", theirs.tokenizer)
    processor.chat_template = TEMPLATE
    trainer = make_trainer(
        tmp_path,
        model=theirs.model,
        reward=lambda completions, **columns: [one.reward for one in batch.rollouts],
        trainer={
            "processing_class": processor,
            "train_dataset": pictured_rows(batch),
            "rollout_func": lambda prompts, trainer: rollouts,
        },
        gradient_accumulation_steps=4,
        num_iterations=2,  # as above
        max_completion_length=ROLLOUT["max_completion_tokens"],
        temperature=ROLLOUT["temperature"],
        loss_type=loss_type,
        epsilon_high=0.28,
        scale_rewards="none",
        remove_unused_columns=False,
        max_steps=1,
    )
    inputs = first_inputs(trainer)
    assert all("pixel_values" in part and "old_per_token_logps" in part for part in inputs)
    # Its chat template and processor make the tokens that ours make.
    asked = [row["prompt"] for row in trainer.train_dataset]
    assert sorted({tuple(row) for row in rollouts["prompt_ids"]}) == sorted(
        tuple(prompt_of(trainer, row, images))
        for row, images in zip(asked, trainer.train_dataset["images"], strict=True)
    )
    for model in (trainer.model, engine.student.model):
        move_trained(model)
    loss, gradient = loss_and_gradient(trainer, inputs)
    found = engine.accumulate_gradient(batch, range(len(batch.rollouts)), TokenStats())
    own = [one.grad.flatten().double() for one in engine.parameters]
    assert found == pytest.approx(loss, abs=1e-6)
    assert distance(torch.cat(own), gradient) < 1e-5 and gradient.norm() > 1e-2


def move_trained(model: Any) -> None:
    """As optimiser steps on the same rollouts would, those that are frozen left as they are."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for one in model.parameters():
            if one.requires_grad:
                one.add_(torch.randn(one.shape, generator=generator), alpha=0.02)


def prompt_of(trainer: Any, messages: Any, images: Any) -> list[int]:
    prompt = prepare_multimodal_messages(messages, images=images)
    return trainer._tokenize_prompts([prompt])[0][0]
