"""`[engine.trl]`: which of TRL's options a run may set."""

import difflib
from dataclasses import fields
from typing import Any

from rlad.engines.trl.config import RLADConfig

DECIDED = {
    *("output_dir", "max_steps", "num_train_epochs", "learning_rate", "lr_scheduler_type", "warmup_steps", "warmup_ratio"),
    *("weight_decay", "adam_beta1", "adam_beta2", "max_grad_norm", "optim", "seed", "data_seed", "bf16", "fp16", "use_cpu"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "steps_per_generation"),
    *("num_iterations", "save_strategy", "save_steps", "logging_steps", "logging_nan_inf_filter"),
    *("logging_strategy", "eval_strategy", "top_p", "top_k", "min_p", "repetition_penalty", "generation_kwargs", "use_vllm"),
    *("reward_weights", "resume_from_checkpoint", "teacher_dtype", "teacher_tokens_per_batch"),
    *("trust_remote_code", "model_init_kwargs"),
}
"""What the other sections of a run's config say, or what the run directory, our optimiser and sampler are made of."""

LAUNCHERS = {"deepspeed", "fsdp", "fsdp_config", "accelerator_config", "parallelism_config", "ddp_backend", "local_rank"}
"""What whoever starts the processes says."""


def require_free(options: dict[str, Any], decided: set[str]) -> None:
    """`ValueError` unless every option is one of TRL's that no other section of the config decides."""
    known = {field.name for field in fields(RLADConfig) if field.init}
    for name in options:
        if name == "hub_token":
            raise ValueError("engine.trl.hub_token is a secret, and the config is stored with the run; set HF_TOKEN instead.")
        if name == "report_to":
            raise ValueError("engine.trl.report_to is what [logging] says for both engines; set logging.trackers instead.")
        if name in LAUNCHERS:
            raise ValueError(
                f"engine.trl.{name} is what starts the processes decides; use `rlad train --launch`, torchrun or accelerate "
                "launch, and leave it out there."
            )
        if name in decided:
            raise ValueError(
                f"engine.trl.{name} is decided by the rest of the run's config, or by its sampler; leave it out there."
            )
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known - decided - LAUNCHERS), n=1)
            hint = f"did you mean {near[0]!r}?" if near else "see TRL's GRPOConfig for what there is."
            raise ValueError(f"engine.trl.{name} is no option of TRL's GRPOConfig: {hint}")
