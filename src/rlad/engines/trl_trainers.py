"""TRL's own trainers, told how a run of ours is to be made. The only file that imports trl (and datasets).

Loss, gradient, optimiser step and schedule are TRL's and transformers'. Ours are the completions, how they are cut into
micro-batches, and the places where a run may be stopped.
"""

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PrinterCallback, Trainer
from trl.trainer.distillation_config import DistillationConfig
from trl.trainer.distillation_trainer import DistillationTrainer
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling, SFTTrainer

from rlad.config import RunConfig
from rlad.engines.teacher_data import TeacherData, TokenIds, micro_batch_rows, sequences_per_step
from rlad.errors import RunFailedError
from rlad.language_model import LanguageModel
from rlad.rollouts import RolloutGroup
from rlad.seeds import stream_seed


class _Watched(Trainer):
    """May be stopped before every micro-batch, ends a run whose loss is not finite, and reports nothing to anybody."""

    before_work: Callable[[], None]

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        self.before_work()
        loss = super().training_step(*args, **kwargs)
        require_finite(self.state.global_step + 1, loss=float(loss))
        return loss

    def _send_telemetry(self) -> None:
        pass


def require_finite(step: int, **values: float) -> None:
    """`RunFailedError` unless all are finite. To be called before the weights change."""
    for name, value in values.items():
        if not math.isfinite(value):
            raise RunFailedError(
                f"step {step}: the {name.replace('_', ' ')} is {value}, so the weights were left as they are; start a new run "
                "with a lower optimization.learning_rate."
            )


class WatchedSFTTrainer(_Watched, SFTTrainer):
    pass


class OnPolicyTrainer(_Watched, DistillationTrainer):
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
    arguments = _arguments(
        SFTConfig,
        config,
        student,
        folder,
        longest=longest,
        max_length=None,
        train_sampling_strategy="sequential",
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    with _config_untouched(student.model):
        trainer = WatchedSFTTrainer(
            student.model,
            arguments,
            data_collator=DataCollatorForLanguageModeling(student.pad_token_id),
            train_dataset=Dataset.from_list(rows).select([i for step in data.steps for i in step]),
            processing_class=copy.deepcopy(student.tokenizer),
            optimizers=(_optimizer(config, student), None),
        )
    return _without_frills(trainer)


def gkd_trainer(
    config: RunConfig, student: LanguageModel, teacher: LanguageModel, longest: int, folder: str
) -> OnPolicyTrainer:
    """Distils on the student's own completions; `longest` is the most tokens that a prompt with its completion can have."""
    assert config.objective.type == "gkd"
    arguments = _arguments(
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
    with _config_untouched(student.model):
        trainer = OnPolicyTrainer(
            student.model,
            teacher.model,
            arguments,
            train_dataset=Dataset.from_dict({"prompt": indices}),
            processing_class=copy.deepcopy(student.tokenizer),
            optimizers=(_optimizer(config, student), None),
        )
    trainer.group_size = group_size
    return _without_frills(trainer)


def _arguments(kind: Any, config: RunConfig, student: LanguageModel, folder: str, *, longest: int, **own: Any) -> Any:
    """The arguments of both trainers: our budget and optimiser, float32 unless the student computes otherwise, no output."""
    loop, on_cpu = config.optimization, student.model.device.type == "cpu"
    per_step = sequences_per_step(config)
    rows = micro_batch_rows(per_step, longest, loop.tokens_per_batch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # TRL 1.16 itself sets what newer versions of transformers rename
        arguments = kind(
            output_dir=folder,
            max_steps=loop.num_steps,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=per_step // rows,
            learning_rate=loop.learning_rate,
            lr_scheduler_type="constant_with_warmup" if loop.schedule == "constant" else loop.schedule,
            warmup_steps=loop.warmup_steps,
            max_grad_norm=loop.max_grad_norm,
            bf16=student.compute_dtype == torch.bfloat16,
            gradient_checkpointing=config.student.gradient_checkpointing,
            use_cpu=on_cpu,
            dataloader_pin_memory=not on_cpu,
            seed=stream_seed(config.seed, "trl", 0) % 2**32,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_steps=1,
            **own,
        )
    # One device, even where there are more: TRL refuses to spread a process over several.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _optimizer(config: RunConfig, student: LanguageModel) -> torch.optim.Optimizer:
    """As in the native engine; transformers' own would not decay the weights of norms and biases."""
    loop = config.optimization
    return torch.optim.AdamW(
        student.model.parameters(), lr=loop.learning_rate, betas=loop.betas, weight_decay=loop.weight_decay
    )


@contextmanager
def _config_untouched(model: PreTrainedModel) -> Iterator[None]:
    """Trainers write their own padding token and `use_cache = False` into a model's configs, and so into its checkpoints."""
    config, generation_config = copy.deepcopy(vars(model.config)), copy.deepcopy(model.generation_config)
    yield
    vars(model.config).update(config)
    model.generation_config = generation_config


def _without_frills(trainer: Any) -> Any:
    trainer.remove_callback(PrinterCallback)
    # With a tokenizer, `train` would write that one's special tokens into the model's configs, and say so.
    trainer.processing_class = None
    return trainer
