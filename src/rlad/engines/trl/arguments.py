"""Make TRL's arguments from a run's config."""

import os
from dataclasses import fields
from importlib.metadata import version
from tempfile import TemporaryDirectory
from typing import Any

import torch

from rlad.config.capabilities import require_engine
from rlad.config.engine import DECIDED
from rlad.config.run import RunConfig
from rlad.engines.trl.config import AGGREGATION, RLADConfig
from rlad.errors import UserError
from rlad.text import first_line, nearest

SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}
LOSS_TYPES = {mode: name for name, mode in AGGREGATION.items() if name != "bnpo"}
MOST_COMPLETIONS_AT_ONCE = 8
"""In one process's forward and backward pass, unless a config sets another number."""


def make_arguments(config: RunConfig, output_dir: str) -> RLADConfig:
    """Make TRL's arguments for a run. Raises `UserError` for settings that TRL does not have, or
    refuses."""
    given = config.engine.trl
    known = [field.name for field in fields(RLADConfig) if field.name not in DECIDED]
    for name in given:
        if name not in known:
            raise UserError(
                f"engine.trl.{name} is not a setting of TRL's GRPOConfig: "
                f"{nearest(name, known) or 'look for its name in the documentation of TRL'}"
            )
    settings: dict[str, Any] = {"ddp_find_unused_parameters": False}
    settings |= given | batch_sizes(config) | decided(config)
    try:
        return RLADConfig(output_dir, **settings)
    except UserError:
        raise
    except (ValueError, TypeError, ImportError) as error:
        reason = first_line(error).rstrip(".")
        raise UserError(f"TRL cannot make this run: {reason}.") from error


def describe_arguments(config: RunConfig) -> str:
    """Say in one line what TRL will do. Raises `UserError` for what it cannot."""
    require_engine("trl", config.objective, config)
    with TemporaryDirectory() as folder:
        args = make_arguments(config, folder)
    by = f"vLLM ({args.vllm_mode})" if args.use_vllm else "transformers"
    return (
        f"TRL {version('trl')}, sampling by {by}; a step has {args.gradient_accumulation_steps} "
        f"forward passes of {args.per_device_train_batch_size} completions, in each of "
        f"{args.world_size} process{'es' * (args.world_size > 1)}"
    )


def batch_sizes(config: RunConfig) -> dict[str, int]:
    """Divide the completions of an optimiser step over processes and forward passes."""
    rollout = config.rollout
    given = config.engine.trl
    per_batch = config.optimization.steps_per_rollout_batch
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    num_completions = rollout.prompts_per_batch * rollout.group_size // per_batch
    share, rest = divmod(num_completions, num_processes)
    divisors = range(1, min(share, MOST_COMPLETIONS_AT_ONCE) + 1)
    size = max((one for one in divisors if share % one == 0), default=1)
    if "gradient_accumulation_steps" in given:
        size = share // given["gradient_accumulation_steps"]
    size = given.get("per_device_train_batch_size", size)
    accumulation = given.get("gradient_accumulation_steps", share // max(size, 1))
    if rest or size * accumulation != share:
        raise UserError(
            f"an optimiser step has {num_completions} completions, which are not {num_processes} "
            f"processes x {size} per_device_train_batch_size x {accumulation} "
            "gradient_accumulation_steps; change [engine.trl], the number of processes, or "
            "rollout.prompts_per_batch."
        )
    return {
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": accumulation,
        "steps_per_generation": accumulation * per_batch,
    }


def decided(config: RunConfig) -> dict[str, Any]:
    """Return what the other sections of a config decide, under TRL's names."""
    student = config.student
    rollout = config.rollout
    loop = config.optimization
    correction = rollout.correction
    has_gpu = torch.accelerator.is_available()
    return {
        "objective": config.objective.model_dump(),
        "loss_type": LOSS_TYPES[loop.aggregation],
        "advantages": "rlad",
        "scale_rewards": "group" if loop.advantage_scale == "std" else "none",
        "learning_rate": loop.learning_rate,
        "lr_scheduler_type": SCHEDULES[loop.schedule],
        "warmup_steps": loop.warmup_steps,
        "weight_decay": loop.weight_decay,
        "adam_beta1": loop.betas[0],
        "adam_beta2": loop.betas[1],
        "max_grad_norm": loop.max_grad_norm,
        "beta": loop.kl_coef,
        "max_missing_teacher_share": loop.max_missing_teacher_share,
        "max_steps": loop.num_steps,
        "num_generations": rollout.group_size,
        "max_completion_length": rollout.max_completion_tokens,
        "temperature": rollout.temperature,
        "chat_template_kwargs": rollout.chat_template_kwargs,
        "vllm_importance_sampling_correction": correction.mode != "none",
        "vllm_importance_sampling_mode": correction.mode,
        "vllm_importance_sampling_clip_min": correction.clip_min,
        "vllm_importance_sampling_clip_max": correction.clip_max,
        "shuffle_dataset": False,
        "seed": config.seed,
        "use_cpu": student.device == "cpu" or not has_gpu,
        "bf16": student.dtype == "bfloat16",
        "gradient_checkpointing": student.gradient_checkpointing,
        "teacher_dtype": getattr(config.teacher, "dtype", "float32"),
        "teacher_tokens_per_batch": getattr(config.teacher, "tokens_per_batch", 16_384),
        # Only our callback writes the run directory.
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
    }
