"""TRL's own trainers for `sft` and `gkd`, told how a run of ours is to be made.

Loss, gradient, optimiser step and schedule are TRL's and transformers'. Ours are the completions, how they are cut into
micro-batches, and the places where a run may be stopped.
"""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PrinterCallback
from trl.trainer.distillation_config import DistillationConfig
from trl.trainer.distillation_trainer import DistillationTrainer
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling, SFTTrainer

from rlad.config.run import RunConfig
from rlad.engines.trl.setup import Watched, adamw, config_untouched, trainer_arguments
from rlad.engines.trl.teacher_data import TeacherData, TokenIds, sequences_per_step
from rlad.errors import RunFailedError
from rlad.models.loading import LanguageModel
from rlad.rollouts.types import RolloutGroup


class _StopsAtNonFinite(Watched):
    """Ends a run whose loss is not finite."""

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        require_finite(self.state.global_step + 1, loss=float(loss))
        return loss


def require_finite(step: int, **values: float) -> None:
    """`RunFailedError` unless all are finite. To be called before the weights change."""
    for name, value in values.items():
        if not math.isfinite(value):
            raise RunFailedError(
                f"step {step}: the {name.replace('_', ' ')} is {value}, so the weights were left as they are; start a new run "
                "with a lower optimization.learning_rate."
            )


class WatchedSFTTrainer(_StopsAtNonFinite, SFTTrainer):
    pass


class OnPolicyTrainer(_StopsAtNonFinite, DistillationTrainer):
    """Distils on the groups that `roll_out` returns for the problem indices of a step."""

    roll_out: Callable[[Sequence[int]], list[RolloutGroup]]
    group_size: int
    groups: list[RolloutGroup]
    """of the present step"""

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """The next micro-batch. TRL would sample with `generate`; our sampler draws what the RL methods draw, and faster."""
        accumulation = self.args.gradient_accumulation_steps
        if self._step % accumulation == 0:
            student: Any = self.model
            student.eval()  # checkpointing, which is for training mode, would switch the sampler's cache off
            self.groups = self.roll_out([row["prompt"] for row in generation_batch[:: self.group_size]])
            student.train()
            pairs = [(group.prompt_token_ids, r.completion.token_ids) for group in self.groups for r in group.rollouts]
            self._buffered_inputs = _micro_batches(pairs, accumulation, self.accelerator.device)
        return self._buffered_inputs[self._step % accumulation]

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        # TRL calls the backbone below the forward that accelerate has wrapped: without this, bfloat16 would not be used.
        with self.accelerator.autocast():
            return super().compute_loss(*args, **kwargs)


def _micro_batches(pairs: Sequence[tuple[TokenIds, TokenIds]], number: int, device: torch.device) -> list[dict[str, Tensor]]:
    """What `DistillationTrainer` wants of each micro-batch, sequences of similar length together.

    Sequences are padded on the right alone: TRL gives the model no positions, so padding on the left would shift them. What a
    prompt has more than the shortest one of its micro-batch therefore stands among the completion tokens, where `tool_mask`
    (tokens that the student did not write) keeps it out of the loss.
    """
    pairs = sorted(pairs, key=lambda pair: -len(pair[0]) - len(pair[1]))
    num_tokens = torch.tensor(float(sum(len(completion) for _, completion in pairs)), device=device)
    size, batches = len(pairs) // number, []
    for start in range(0, len(pairs), size):
        part = pairs[start : start + size]
        shared = min(len(prompt) for prompt, _ in part)
        prompts = torch.tensor([prompt[:shared] for prompt, _ in part], device=device)
        rest = [torch.tensor((*prompt[shared:], *completion)) for prompt, completion in part]
        written = [torch.arange(len(row)) >= len(row) - len(pair[1]) for row, pair in zip(rest, part, strict=True)]
        batches.append(
            {
                "prompt_ids": prompts,
                "prompt_mask": torch.ones_like(prompts),
                "completion_ids": pad_sequence(rest, batch_first=True).to(device),
                "completion_mask": pad_sequence([torch.ones_like(row) for row in rest], batch_first=True).to(device),
                "tool_mask": pad_sequence(written, batch_first=True).long().to(device),
                "num_items_in_batch": num_tokens,
            }
        )
    return batches


def sft_trainer(config: RunConfig, student: LanguageModel, data: TeacherData, folder: str) -> WatchedSFTTrainer:
    """Trains on the teacher's completions, prompts masked, in the order of `data`."""
    rows = [
        {"input_ids": [*prompt, *completion], "labels": [-100] * len(prompt) + list(completion)}
        for prompt, completion in data.sequences
    ]
    longest = max(len(row["input_ids"]) for row in rows)
    arguments = trainer_arguments(
        SFTConfig,
        config,
        student,
        folder,
        longest=longest,
        max_length=None,
        train_sampling_strategy="sequential",
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    with config_untouched(student.model):
        trainer = WatchedSFTTrainer(
            student.model,
            arguments,
            data_collator=DataCollatorForLanguageModeling(student.pad_token_id),
            train_dataset=Dataset.from_list(rows).select([i for step in data.steps for i in step]),
            processing_class=copy.deepcopy(student.tokenizer),
            optimizers=(adamw(config, student), None),
        )
    return _without_frills(trainer)


def gkd_trainer(
    config: RunConfig, student: LanguageModel, teacher: LanguageModel, longest: int, folder: str
) -> OnPolicyTrainer:
    """Distils on the student's own completions; `longest` is the most tokens that a prompt with its completion can have."""
    assert config.objective.type == "gkd"
    arguments = trainer_arguments(
        DistillationConfig,
        config,
        student,
        folder,
        longest=longest,
        beta=config.objective.beta,
        temperature=config.rollout.temperature,
        shuffle_dataset=False,
    )
    per_step, group_size = sequences_per_step(config), config.rollout.group_size
    indices = [row // group_size for row in range(config.optimization.num_steps * per_step)]
    with config_untouched(student.model):
        trainer = OnPolicyTrainer(
            student.model,
            teacher.model,
            arguments,
            train_dataset=Dataset.from_dict({"prompt": indices}),
            processing_class=copy.deepcopy(student.tokenizer),
            optimizers=(adamw(config, student), None),
        )
    trainer.group_size = group_size
    return _without_frills(trainer)


def _without_frills(trainer: Any) -> Any:
    trainer.remove_callback(PrinterCallback)
    # With a tokenizer, `train` would write that one's special tokens into the model's configs, and say so.
    trainer.processing_class = None
    return trainer
