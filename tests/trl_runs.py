"""Trainers of TRL on tiny models, and what their optimiser steps did. Also a program of its own:

torchrun --nproc_per_node 2 tests/trl_runs.py FOLDER '{"run": {"objective": "trrd"}}'
"""

import json
import os
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from rlad.engines.trl.config import RLADConfig
from rlad.engines.trl.trainer import RLADTrainer
from tiny_models import VOCABULARY, random_tokens, tiny_model, tiny_tokenizer

ARGUMENTS: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "num_generations": 4,
    "max_completion_length": 10,
    "learning_rate": 1e-2,
    "max_steps": 4,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "temperature": 0.8,
    "use_cpu": True,
    "dataloader_pin_memory": False,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "shuffle_dataset": False,
    "use_bias_correction_kl": False,
    "epsilon": 0.2,
}


def prompts(number: int = 32, *, longest: int = 5) -> list[str]:
    """`longest` 1 makes them all of one length: GPT-2 counts its positions from the padding on."""
    lengths = [1 + i % longest for i in range(number)] if longest > 1 else [4] * number
    return [" ".join(f"w{token}" for token in row) for row in random_tokens(*lengths, seed=7)]


def few_high_words(completions: list[str], **columns: Any) -> list[float]:
    """How many of the words are low ones, in quarters: exact in float32."""
    words = [[int(word[1:]) for word in text.split() if word[0] == "w"] for text in completions]
    return [
        round(4 * sum(n < VOCABULARY // 2 for n in row) / max(len(row), 1)) / 4 for row in words
    ]


def student(
    family: str = "llama", *, dtype: torch.dtype = torch.float32, seed: int = 0
) -> PreTrainedModel:
    """Ends are frequent, so lengths differ."""
    model: Any = tiny_model(family, seed=seed)
    model.generation_config.eos_token_id = list(range(1, 10))
    return model.to(dtype)


def nearby(model: PreTrainedModel, *, seed: int = 1, distance: float = 0.05) -> PreTrainedModel:
    """A copy whose weights are a little off: its log-probs fall within, at and beyond the clamp of
    TRRD."""
    kind: Any = type(model)
    other = kind(model.config).to(
        model.dtype
    )  # no deep copy: TRL's forward in it would be that of the original
    other.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(
                torch.randn(parameter.shape, generator=generator).to(parameter), alpha=distance
            )
    return other.eval()


def make_trainer(
    folder: Path,
    objective: Any = None,
    *,
    model: Any = None,
    longest: int = 5,
    reward: Any = few_high_words,
    trainer: dict[str, Any] | None = None,
    **arguments: Any,
) -> Any:
    """TRL's own trainer where no objective is named; ours else, whose teacher is near the student
    unless one is given."""
    model = student() if model is None else model
    more = {"reward_funcs": reward, "processing_class": tiny_tokenizer(), **(trainer or {})}
    more.setdefault("train_dataset", Dataset.from_dict({"prompt": prompts(longest=longest)}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if objective is None:
            return GRPOTrainer(
                model, args=GRPOConfig(str(folder), **(ARGUMENTS | arguments)), **more
            )
        more.setdefault("teacher", nearby(model) if isinstance(model, PreTrainedModel) else None)
        return RLADTrainer(
            model,
            args=RLADConfig(str(folder), objective=objective, **(ARGUMENTS | arguments)),
            **more,
        )


@dataclass
class Steps(TrainerCallback):
    """What every optimiser step of a run did."""

    gradients: list[Tensor] = field(default_factory=list)
    logs: list[dict[str, float]] = field(default_factory=list)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        gradients = (p.grad for p in kwargs["model"].parameters())
        self.gradients.append(
            torch.cat(
                [gradient.flatten().double() for gradient in gradients if gradient is not None]
            )
        )

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            self.logs.append(
                {key: value for key, value in logs.items() if isinstance(value, float)}
            )


def steps_of(trainer: Any) -> Steps:
    steps = Steps()
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(steps)
    trainer.train()
    return steps


def first_inputs(trainer: Any) -> list[dict[str, Any]]:
    """The micro-batches of the first generation batch."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    rows = next(iter(trainer.get_train_dataloader()))
    trainer._prepare_inputs(rows)
    return trainer._buffered_inputs


def loss_and_gradient(
    trainer: Any, inputs: list[dict[str, Any]], *, of: Any = None, model: Any = None
) -> tuple[float, Tensor]:
    """Of one optimiser step over these micro-batches, of all processes; by TRL's own loss when `of`
    is `GRPOTrainer`.

    `model` is what stands for the trainer's own where that is wrapped.
    """
    trainer.model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for part in inputs:
        loss = (of or type(trainer))._compute_loss(trainer, model or trainer.model, part)
        loss.backward()
        total += loss.detach()
    gradients: list[Any] = [
        torch.zeros_like(one) if one.grad is None else one.grad  # a layer that nothing reads
        for one in trainer.model.parameters()
        if one.requires_grad
    ]
    whole = [
        gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
        for gradient in gradients
    ]
    mean = trainer.accelerator.reduce(total, "mean")
    return float(mean), torch.cat([gradient.flatten().double() for gradient in whole])


def distance(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def move(trainer: Any, *, by: float = 0.02) -> None:
    """As optimiser steps on the same rollouts would: the student is no longer the policy that
    sampled."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(
                torch.randn(parameter.shape, generator=generator).to(parameter), alpha=by
            )


def student_logprobs(trainer: Any, inputs: dict[str, Any]) -> Tensor:
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    width = inputs["completion_ids"].size(1)
    return trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, width)[0].detach()


def rows_of(trainer: Any, part: dict[str, Any]) -> list[dict[str, list[float]]]:
    """Of each completion of a micro-batch, with a leash and rollouts by another sampler, the
    log-probs of its tokens."""
    columns = {
        "student": student_logprobs(trainer, part),
        "old": part["old_per_token_logps"],
        "sampled": part["sampling_per_token_logps"],
        "teacher": part["teacher_logprobs"],
        "reference": part["ref_per_token_logps"],
    }
    mask = part["completion_mask"].bool()
    return [
        {name: values[i][mask[i]].tolist() for name, values in columns.items()}
        for i in range(len(mask))
    ]


# --- under torchrun -------------------------------------------------------------------------------


def same_rollouts(prompts: list[str], trainer: Any) -> dict[str, Any]:
    """Completions that depend on the prompt and on the place in its group alone, however groups are
    spread over processes."""
    first = len(prompts) * trainer.accelerator.process_index
    tokenizer, rows = trainer.processing_class, []
    for i, prompt in enumerate(prompts):
        seed = sum(tokenizer(prompt)["input_ids"]) * 100 + (first + i) % trainer.num_generations
        (row,) = random_tokens(1 + seed % 9, seed=seed)
        rows.append(row)
    logprobs = [[-2.0] * len(row) for row in rows]
    return {
        "prompt_ids": [tokenizer(p)["input_ids"] for p in prompts],
        "completion_ids": rows,
        "logprobs": logprobs,
    }


def die_in_the_second_process(completions: list[str], **columns: Any) -> list[float]:
    if os.environ["RANK"] == "1":
        os._exit(9)
    return few_high_words(completions)


def main(folder: Path, runs: dict[str, dict[str, Any]]) -> None:
    for name, arguments in runs.items():
        if arguments.pop("second_process_dies", False):
            arguments["reward"] = die_in_the_second_process
        model = student("gpt2", dtype=torch.float64)
        trainer = make_trainer(
            folder, model=model, longest=1, trainer={"rollout_func": same_rollouts}, **arguments
        )
        steps, world = steps_of(trainer), trainer.accelerator.num_processes
        if trainer.accelerator.is_main_process:
            torch.save(
                {"gradients": steps.gradients, "logs": steps.logs, "world": world},
                folder / f"{name}.pt",
            )


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
