"""What a run's config says in the words of TRL's arguments: for the engine, and for the script of `rlad export trl`."""

from typing import Any

from rlad.config.run import Annealed, RunConfig
from rlad.engines.trl.config import AGGREGATION
from rlad.engines.trl.teacher_data import micro_batch_rows, sequences_per_step
from rlad.seeds import stream_seed


def loop_arguments(config: RunConfig, *, longest: int, num_processes: int = 1) -> dict[str, Any]:
    """Budget, optimiser and micro-batches of one of `num_processes`, for every trainer of TRL.

    `longest` is the most tokens that a prompt with its completion can have.
    """
    loop, per_process = config.optimization, sequences_per_step(config) // num_processes
    rows = micro_batch_rows(per_process, longest, loop.tokens_per_batch)
    return {
        "max_steps": loop.num_steps,
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": per_process // rows,
        "learning_rate": loop.learning_rate,
        "lr_scheduler_type": "constant_with_warmup" if loop.schedule == "constant" else loop.schedule,
        "warmup_steps": loop.warmup_steps,
        "max_grad_norm": loop.max_grad_norm,
        "bf16": config.student.dtype == "bfloat16",
        "gradient_checkpointing": config.student.gradient_checkpointing,
        "seed": stream_seed(config.seed, "trl", 0) % 2**32,
        "logging_steps": 1,
    }


def objective_arguments(config: RunConfig) -> dict[str, Any]:
    """Objective and rollouts, for `RLADConfig`."""
    loop, rollout = config.optimization, config.rollout
    assert not isinstance(loop.kl_coef, Annealed), "RunConfig refuses it"
    return {
        "objective": config.objective.model_dump(),
        "advantages": "rlad",
        "loss_type": next(name for name, mode in AGGREGATION.items() if mode == loop.aggregation),
        "scale_rewards": "group" if loop.advantage_scale == "std" else "none",
        "beta": float(loop.kl_coef),
        "num_generations": rollout.group_size,
        "generation_batch_size": sequences_per_step(config) * loop.steps_per_rollout_batch,
        "max_completion_length": rollout.max_completion_tokens,
        "temperature": rollout.temperature,
        "max_missing_teacher_share": loop.max_missing_teacher_share,
        "shuffle_dataset": False,
    }
