"""The engine of a run, and the settings of TRL that other sections decide. Imports no torch."""

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from rlad.config.types import Section

_WHOLE_DISTRIBUTION = "nothing: the loss is that of tokens sampled from the whole distribution"
_RUN_DIRECTORY = "the run directory: [evaluation], [checkpoints] and [logging]"

DECIDED: dict[str, str] = {
    **dict.fromkeys(("objective", "loss_type", "advantages"), "[objective] and [optimization]"),
    "scale_rewards": "optimization.advantage_scale",
    "reward_weights": "the verifier of [task]",
    "learning_rate": "optimization.learning_rate",
    "lr_scheduler_type": "optimization.schedule",
    "lr_scheduler_kwargs": "optimization.schedule",
    "warmup_steps": "optimization.warmup_steps",
    "warmup_ratio": "optimization.warmup_steps",
    "weight_decay": "optimization.weight_decay",
    "adam_beta1": "optimization.betas",
    "adam_beta2": "optimization.betas",
    "max_grad_norm": "optimization.max_grad_norm",
    "beta": "optimization.kl_coef",
    "max_missing_teacher_share": "optimization.max_missing_teacher_share",
    "max_steps": "optimization.num_steps",
    "num_train_epochs": "optimization.num_steps",
    "num_iterations": "optimization.steps_per_rollout_batch",
    "steps_per_generation": "optimization.steps_per_rollout_batch",
    "generation_batch_size": "rollout.prompts_per_batch and rollout.group_size",
    "num_generations": "rollout.group_size",
    "max_completion_length": "rollout.max_completion_tokens",
    "temperature": "rollout.temperature",
    "chat_template_kwargs": "rollout.chat_template_kwargs",
    "vllm_importance_sampling_correction": "rollout.correction.mode",
    "vllm_importance_sampling_mode": "rollout.correction.mode",
    "vllm_importance_sampling_cap": "rollout.correction.clip_max",
    "vllm_importance_sampling_clip_min": "rollout.correction.clip_min",
    "vllm_importance_sampling_clip_max": "rollout.correction.clip_max",
    **dict.fromkeys(
        ("top_p", "top_k", "min_p", "repetition_penalty", "generation_kwargs"), _WHOLE_DISTRIBUTION
    ),
    "shuffle_dataset": "the order of the problems, which is that of the native engine",
    "seed": "seed",
    "data_seed": "seed",
    "use_cpu": "student.device",
    "bf16": "student.dtype",
    "fp16": "student.dtype",
    "gradient_checkpointing": "student.gradient_checkpointing",
    "model_init_kwargs": "[student]",
    "trust_remote_code": "nothing: rlad runs no code that comes with a model",
    "teacher_dtype": "teacher.dtype",
    "teacher_tokens_per_batch": "teacher.tokens_per_batch",
    **dict.fromkeys(
        (
            *("output_dir", "do_eval", "eval_strategy", "eval_steps", "eval_on_start"),
            *("save_strategy", "save_steps", "save_total_limit", "save_only_model"),
            *("logging_strategy", "logging_steps", "logging_first_step", "report_to", "run_name"),
            *("disable_tqdm", "log_completions", "push_to_hub", "resume_from_checkpoint"),
            *("load_best_model_at_end", "metric_for_best_model", "enable_jit_checkpoint"),
        ),
        _RUN_DIRECTORY,
    ),
}
"""TRL's name -> the setting of rlad that decides it."""


REPLACED: dict[str, tuple[Any, str]] = {
    "epsilon": (0.2, "set clip_low of the objective"),
    "epsilon_high": (None, "set clip_high of the objective"),
    "delta": (None, "set dual_clip of the objective (trrd, grpo)"),
    "importance_sampling_level": ("token", "set ratio_level of the objective (trrd, grpo)"),
    "use_bias_correction_kl": (False, "the KL leash is the k3 estimate, without the ratio"),
    "off_policy_mask_threshold": (None, "leave it out"),
    "top_entropy_quantile": (1.0, "leave it out"),
    "entropy_coef": (0.0, "leave it out"),
    "use_adaptive_entropy": (False, "leave it out"),
}
"""Settings of TRL's own loss that our loss does not have: the neutral value, and what to do
instead."""


class EngineConfig(Section):
    """The engine that runs the optimiser steps."""

    type: Literal["native", "trl"] = "native"
    """our own loop for one device (native), or TRL's trainer for several GPUs and hosts"""
    trl: dict[str, Any] = Field(default={})
    """settings of TRL's GRPOConfig by name, such as { use_vllm = true }; settings that other
    sections decide are refused"""

    def problems(self) -> Iterator[str]:
        for name in self.trl:
            if name in DECIDED:
                yield f"trl.{name} is decided by {DECIDED[name]}; leave it out of [engine.trl]"
