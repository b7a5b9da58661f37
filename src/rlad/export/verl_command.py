"""A run's config as overrides of `verl.trainer.main_ppo` (0.9), and the settings without an
equivalent there. Imports no verl."""

from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from rlad.config.capabilities import require_engine
from rlad.config.file import changed_settings
from rlad.config.run import RunConfig
from rlad.engines.verl.objective import VARIABLE, objective_json
from rlad.errors import UserError
from rlad.models.files import located

AGGREGATION = {
    "sequence_mean": "seq-mean-token-mean",
    "token_mean": "token-mean",
    "constant_length": "seq-mean-token-sum-norm",
}
HERE = "${HERE}/"
"""Bash replaces this by the exported folder, wherever it is."""
_ACTOR = "actor_rollout_ref.actor"
_ROLLOUT = "actor_rollout_ref.rollout"
_TEACHER = "distillation.teacher_models.teacher_model"
_SAME = {
    "data.train_batch_size": "rollout.prompts_per_batch",
    "data.max_response_length": "rollout.max_completion_tokens",
    "data.seed": "seed",
    "actor_rollout_ref.model.enable_gradient_checkpointing": "student.gradient_checkpointing",
    f"{_ROLLOUT}.dtype": "student.dtype",
    f"{_ROLLOUT}.n": "rollout.group_size",
    f"{_ROLLOUT}.temperature": "rollout.temperature",
    f"{_ROLLOUT}.seed": "seed",
    f"{_ROLLOUT}.val_kwargs.n": "evaluation.num_validation_samples",
    f"{_ROLLOUT}.val_kwargs.temperature": "evaluation.temperature",
    f"{_ACTOR}.loss_scale_factor": "rollout.max_completion_tokens",
    f"{_ACTOR}.kl_loss_coef": "optimization.kl_coef",
    f"{_ACTOR}.data_loader_seed": "seed",
    f"{_ACTOR}.fsdp_config.seed": "seed",
    f"{_ACTOR}.optim.lr": "optimization.learning_rate",
    f"{_ACTOR}.optim.betas": "optimization.betas",
    f"{_ACTOR}.optim.weight_decay": "optimization.weight_decay",
    f"{_ACTOR}.optim.lr_scheduler_type": "optimization.schedule",
    f"{_ACTOR}.optim.clip_grad": "optimization.max_grad_norm",
    f"{_ACTOR}.grad_clip": "optimization.max_grad_norm",
}
"""verl's keys for settings that it also has."""
_ALWAYS = {
    "data.train_files": f"{HERE}train.parquet",
    "data.val_files": f"{HERE}validation.parquet",
    "data.shuffle": False,
    "data.truncation": "error",
    "reward.custom_reward_function.path": "pkg://rlad.engines.verl.reward",
    "reward.custom_reward_function.name": "compute_score",
    "+reward.custom_reward_function.reward_kwargs.config": f"{HERE}config.toml",
    "actor_rollout_ref.ref.strategy": "fsdp2",
    f"{_ACTOR}.strategy": "fsdp2",
    f"{_ACTOR}.ppo_epochs": 1,
    f"{_ACTOR}.use_dynamic_bsz": True,
    f"{_ACTOR}.entropy_coeff": 0,
    f"{_ACTOR}.kl_loss_type": "low_var_kl",
    f"{_ROLLOUT}.name": "vllm",
    f"{_ROLLOUT}.top_p": 1.0,
    f"{_ROLLOUT}.top_k": -1,
    f"{_ROLLOUT}.tensor_model_parallel_size": 1,
    "algorithm.adv_estimator": "grpo",
    "algorithm.use_kl_in_reward": False,
    # Our token losses hold reward and clipping already; verl adds nothing to them.
    "distillation.distillation_loss.use_task_rewards": False,
    "distillation.distillation_loss.use_policy_gradient": False,
    "distillation.distillation_loss.loss_max_clamp": None,
    "trainer.total_epochs": 1,
    "trainer.val_before_train": True,
    "trainer.logger": ["console"],
    "trainer.project_name": "rlad",
    "trainer.default_local_dir": f"{HERE}checkpoints",
}
_NOT_CARRIED_OVER = {
    "optimization.max_seconds": "verl has no such limit",
    "optimization.max_teacher_tokens": "verl has no such limit",
    "optimization.max_skipped_steps": "verl has no such limit",
    "rollout.max_batch_rows": "vLLM schedules by itself",
    "rollout.cuda_graphs": "vLLM makes its own",
    "rollout.engine": "verl samples with vLLM",
    "rollout.vllm": "verl starts vLLM itself",
    "rollout.correction": "verl adds no importance weights on this route",
    "student.device": "verl places models itself",
    "teacher.device": "verl places models itself",
    "teacher.keep": "verl places models itself",
    "teacher.tokens_per_batch": "verl's servers choose it",
}
# verl's GRPO always bounds the loss of negative advantages; this bound is never reached.
_NO_DUAL_CLIP = 1e9


@dataclass(frozen=True, slots=True)
class Cluster:
    """The GPUs of the student (alternating between training and rollouts) and of the teacher."""

    gpus_per_node: int = 8
    nodes: int = 1
    teacher_gpus_per_node: int = 8
    teacher_nodes: int = 1


def require_exportable(config: RunConfig, cluster: Cluster) -> None:
    """Raise `UserError` for what verl would train differently, or not at all."""
    require_engine("verl", config.objective, config)
    gpus = cluster.gpus_per_node * cluster.nodes
    whole = config.rollout.prompts_per_batch * config.rollout.group_size
    step = whole // config.optimization.steps_per_rollout_batch
    if step % gpus:
        raise UserError(
            f"an optimiser step holds {step} completions, which {gpus} GPUs cannot share equally; "
            "change rollout.prompts_per_batch, rollout.group_size or --gpus-per-node and --nodes."
        )


def overrides(
    config: RunConfig, cluster: Cluster, *, prompt_tokens: int, chat_template: str | None
) -> dict[str, Any]:
    """Return Hydra keys and values. `prompt_tokens` is the length of the longest prompt;
    `chat_template` replaces the student's."""
    rollout = config.rollout
    loop = config.optimization
    per_batch = loop.steps_per_rollout_batch
    every = -(-config.evaluation.every_steps // per_batch)
    keys: dict[str, Any] = {
        **_ALWAYS,
        **{key: attrgetter(setting)(config) for key, setting in _SAME.items()},
        "data.max_prompt_length": prompt_tokens,
        "actor_rollout_ref.model.path": model_path(config.student.model),
        f"{_ROLLOUT}.val_kwargs.do_sample": config.evaluation.temperature > 0,
        f"{_ACTOR}.ppo_mini_batch_size": rollout.prompts_per_batch // per_batch,
        # The longest text must fit into a micro-batch, whatever the limit of tokens is.
        f"{_ACTOR}.ppo_max_token_len_per_gpu": max(
            loop.tokens_per_batch, prompt_tokens + rollout.max_completion_tokens
        ),
        f"{_ACTOR}.loss_agg_mode": AGGREGATION[loop.aggregation],
        f"{_ACTOR}.optim.lr_warmup_steps": loop.warmup_steps // per_batch,
        f"{_ACTOR}.use_kl_loss": bool(loop.kl_coef),
        "algorithm.norm_adv_by_std_in_grpo": loop.advantage_scale == "std",
        "trainer.n_gpus_per_node": cluster.gpus_per_node,
        "trainer.nnodes": cluster.nodes,
        "trainer.total_training_steps": loop.num_rollout_batches,
        "trainer.test_freq": every,
        "trainer.save_freq": every,
        "trainer.experiment_name": config.directory.name,
        **_objective(config, cluster),
    }
    for name, value in rollout.chat_template_kwargs.items():
        keys[f"+data.apply_chat_template_kwargs.{name}"] = value
    if chat_template is not None:
        keys["actor_rollout_ref.model.custom_chat_template"] = chat_template
    if config.student.dtype == "float32":
        # verl computes in bfloat16 by itself, also where the weights are float32.
        for part in ("actor", "ref"):
            for kind in ("param", "reduce", "buffer"):
                keys[f"+actor_rollout_ref.{part}.fsdp_config.mixed_precision.{kind}_dtype"] = "fp32"
    return keys


def _objective(config: RunConfig, cluster: Cluster) -> dict[str, Any]:
    objective: Any = config.objective
    teacher: Any = config.teacher
    if not objective.needs_teacher:
        return {
            "distillation.enabled": False,
            f"{_ACTOR}.clip_ratio": objective.clip_low,
            f"{_ACTOR}.clip_ratio_low": objective.clip_low,
            f"{_ACTOR}.clip_ratio_high": objective.clip_high,
            f"{_ACTOR}.clip_ratio_c": objective.dual_clip or _NO_DUAL_CLIP,
        }
    return {
        "distillation.enabled": True,
        "distillation.n_gpus_per_node": cluster.teacher_gpus_per_node,
        "distillation.nnodes": cluster.teacher_nodes,
        "distillation.distillation_loss.loss_mode": objective.type,
        f"{_TEACHER}.model_path": model_path(teacher.model),
        f"{_TEACHER}.inference.dtype": teacher.dtype,
        f"{_TEACHER}.inference.tensor_model_parallel_size": 1,
        f"+ray_kwargs.ray_init.runtime_env.env_vars.{VARIABLE}": objective_json(objective),
    }


def model_path(name: str) -> str:
    """Return a model's location for every node: an absolute folder, or its Hugging Face name."""
    path = Path(located(name))
    return str(path.resolve()) if path.is_dir() else name


def without_equivalent(config: RunConfig) -> list[str]:
    """List what verl does differently, or not at all, one sentence each."""
    loop = config.optimization
    notes = [
        "A completion that the verifier cannot judge is left out of its group, and logged by verl "
        "as a failed session.",
        "An answer that the token limit cuts off is judged like any other: verl does not say that "
        "it was cut.",
        "evaluation: verl validates; the test problems and ood_task are for `rlad evaluate` on the "
        "finished model.",
        "Sampled tokens are vLLM's: the same seed gives other completions than on the native "
        "engine.",
    ]
    if loop.advantage_scale == "std":
        notes.append(
            "Advantages are verl's: divided by the sample standard deviation + 1e-6 (rlad: "
            "population standard deviation + 1e-4)."
        )
    if config.needs_teacher:
        notes.append(
            f"optimization.max_missing_teacher_share = {loop.max_missing_teacher_share} is not "
            "enforced: tokens without a teacher's log-prob have the loss 0, still count in the "
            "denominator, and are logged as actor/rlad/dropped/mean."
        )
    if loop.steps_per_rollout_batch > 1:
        notes += [
            "The learning rate moves once for each rollout batch, not for each optimiser step; so "
            "does the warm-up.",
            "verl chooses which completions of a rollout batch share an optimiser step.",
        ]
    if loop.num_steps % loop.steps_per_rollout_batch:
        notes.append(
            f"optimization.num_steps = {loop.num_steps} is rounded up to whole rollout batches."
        )
    for key, value in changed_settings(config).items():
        for setting, reason in _NOT_CARRIED_OVER.items():
            if key == setting or key.startswith(f"{setting}."):
                notes.append(f"{key} = {value!r} is not carried over: {reason}.")
    return notes
