"""A run's config as overrides of `verl.trainer.main_ppo` (0.9), and what of it has no equivalent
there. Imports no verl."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlad.config.capabilities import require_engine
from rlad.config.file import changed_settings
from rlad.config.run import RunConfig
from rlad.config.teacher import LocalTeacherConfig
from rlad.engines.verl.objective import VARIABLE, objective_json
from rlad.errors import UserError
from rlad.models.files import located

AGGREGATION = {
    "sequence_mean": "seq-mean-token-mean",
    "token_mean": "token-mean",
    "constant_length": "seq-mean-token-sum-norm",
}
_MODEL = "actor_rollout_ref.model"
_ACTOR = "actor_rollout_ref.actor"
_ROLLOUT = "actor_rollout_ref.rollout"
_NOT_CARRIED_OVER = {
    "optimization.max_seconds": "verl has no such limit",
    "optimization.max_teacher_tokens": "verl has no such limit",
    "optimization.max_skipped_steps": "verl has no such limit",
    "rollout.max_batch_rows": "vLLM schedules by itself",
    "student.device": "verl places models itself",
    "teacher.device": "verl places models itself",
    "teacher.keep": "verl places models itself",
    "teacher.tokens_per_batch": "verl's servers choose it",
}
# verl's GRPO always bounds the loss of negative advantages; this bound is never reached.
_NO_DUAL_CLIP = 1e9


@dataclass(frozen=True, slots=True)
class Cluster:
    """GPUs of the student (training and rollouts, in turn) and those of the teacher."""

    gpus_per_node: int = 8
    nodes: int = 1
    teacher_gpus_per_node: int = 8
    teacher_nodes: int = 1


@dataclass(frozen=True, slots=True)
class InFolder:
    """A file in the exported folder, wherever that lies."""

    name: str


def require_exportable(config: RunConfig, cluster: Cluster) -> None:
    """`UserError` with one sentence for what verl would train differently, or not at all."""
    require_engine("verl", config.objective, config)
    gpus = cluster.gpus_per_node * cluster.nodes
    whole = config.rollout.prompts_per_batch * config.rollout.group_size
    step = whole // config.optimization.steps_per_rollout_batch
    for what, number in (("the rollout batch", whole), ("an optimiser step", step)):
        if number % gpus:
            raise UserError(
                f"{what} holds {number} completions, which {gpus} GPUs cannot share equally; "
                "change rollout.prompts_per_batch, rollout.group_size or --gpus-per-node and "
                "--nodes."
            )


def num_rollout_batches(config: RunConfig) -> int:
    """Rollout batches of the whole run."""
    return -(-config.optimization.num_steps // config.optimization.steps_per_rollout_batch)


def overrides(
    config: RunConfig, cluster: Cluster, *, prompt_tokens: int, chat_template: str | None
) -> dict[str, Any]:
    """Hydra keys and values; `prompt_tokens` is the longest prompt's, `chat_template` one that
    replaces the student's."""
    return {
        **_data(config, prompt_tokens),
        **_student(config, chat_template),
        **_rollouts(config),
        **_optimisation(config, prompt_tokens),
        **_objective(config, cluster),
        **_trainer(config, cluster),
    }


def _data(config: RunConfig, prompt_tokens: int) -> dict[str, Any]:
    return {
        "data.train_files": InFolder("train.parquet"),
        "data.val_files": InFolder("validation.parquet"),
        "data.train_batch_size": config.rollout.prompts_per_batch,
        "data.max_prompt_length": prompt_tokens,
        "data.max_response_length": config.rollout.max_completion_tokens,
        "data.shuffle": False,
        "data.seed": config.seed,
        "data.truncation": "error",
        **{
            f"+data.apply_chat_template_kwargs.{name}": value
            for name, value in config.rollout.chat_template_kwargs.items()
        },
        "reward.custom_reward_function.path": "pkg://rlad.engines.verl.reward",
        "reward.custom_reward_function.name": "compute_score",
        "+reward.custom_reward_function.reward_kwargs.config": InFolder("config.toml"),
    }


def _student(config: RunConfig, chat_template: str | None) -> dict[str, Any]:
    keys: dict[str, Any] = {
        f"{_MODEL}.path": model_path(config.student.model),
        f"{_MODEL}.enable_gradient_checkpointing": config.student.gradient_checkpointing,
        f"{_ACTOR}.strategy": "fsdp2",
        "actor_rollout_ref.ref.strategy": "fsdp2",
        f"{_ROLLOUT}.dtype": config.student.dtype,
    }
    if config.student.dtype == "float32":
        # verl computes in bfloat16 by itself, also where the weights are float32.
        for part in ("actor", "ref"):
            for kind in ("param", "reduce", "buffer"):
                keys[f"+actor_rollout_ref.{part}.fsdp_config.mixed_precision.{kind}_dtype"] = "fp32"
    if chat_template is not None:
        keys[f"{_MODEL}.custom_chat_template"] = chat_template
    return keys


def _rollouts(config: RunConfig) -> dict[str, Any]:
    rollout = config.rollout
    evaluation = config.evaluation
    return {
        f"{_ROLLOUT}.name": "vllm",
        f"{_ROLLOUT}.n": rollout.group_size,
        f"{_ROLLOUT}.temperature": rollout.temperature,
        f"{_ROLLOUT}.top_p": 1.0,
        f"{_ROLLOUT}.top_k": -1,
        f"{_ROLLOUT}.seed": config.seed,
        f"{_ROLLOUT}.tensor_model_parallel_size": 1,
        f"{_ROLLOUT}.val_kwargs.n": evaluation.num_validation_samples,
        f"{_ROLLOUT}.val_kwargs.temperature": evaluation.temperature,
        f"{_ROLLOUT}.val_kwargs.do_sample": evaluation.temperature > 0,
    }


def _optimisation(config: RunConfig, prompt_tokens: int) -> dict[str, Any]:
    rollout = config.rollout
    loop = config.optimization
    keys: dict[str, Any] = {
        f"{_ACTOR}.ppo_mini_batch_size": rollout.prompts_per_batch // loop.steps_per_rollout_batch,
        f"{_ACTOR}.ppo_epochs": 1,
        f"{_ACTOR}.use_dynamic_bsz": True,
        # The longest text must fit into a micro-batch, whatever the limit of tokens is.
        f"{_ACTOR}.ppo_max_token_len_per_gpu": max(
            loop.tokens_per_batch, prompt_tokens + rollout.max_completion_tokens
        ),
        f"{_ACTOR}.loss_agg_mode": AGGREGATION[loop.aggregation],
        f"{_ACTOR}.entropy_coeff": 0,
        f"{_ACTOR}.data_loader_seed": config.seed,
        f"{_ACTOR}.fsdp_config.seed": config.seed,
        f"{_ACTOR}.optim.lr": loop.learning_rate,
        f"{_ACTOR}.optim.betas": list(loop.betas),
        f"{_ACTOR}.optim.weight_decay": loop.weight_decay,
        f"{_ACTOR}.optim.lr_scheduler_type": loop.schedule,
        f"{_ACTOR}.optim.lr_warmup_steps": loop.warmup_steps // loop.steps_per_rollout_batch,
        f"{_ACTOR}.optim.clip_grad": loop.max_grad_norm,
        f"{_ACTOR}.grad_clip": loop.max_grad_norm,
        "algorithm.adv_estimator": "grpo",
        "algorithm.norm_adv_by_std_in_grpo": loop.advantage_scale == "std",
        "algorithm.use_kl_in_reward": False,
        f"{_ACTOR}.use_kl_loss": bool(loop.kl_coef),
    }
    if loop.aggregation == "constant_length":
        keys[f"{_ACTOR}.loss_scale_factor"] = rollout.max_completion_tokens
    if loop.kl_coef:
        keys[f"{_ACTOR}.kl_loss_coef"] = loop.kl_coef
        keys[f"{_ACTOR}.kl_loss_type"] = "low_var_kl"
    return keys


def _objective(config: RunConfig, cluster: Cluster) -> dict[str, Any]:
    objective: Any = config.objective
    if not objective.needs_teacher:
        return {
            "distillation.enabled": False,
            f"{_ACTOR}.clip_ratio": objective.clip_low,
            f"{_ACTOR}.clip_ratio_low": objective.clip_low,
            f"{_ACTOR}.clip_ratio_high": objective.clip_high,
            f"{_ACTOR}.clip_ratio_c": objective.dual_clip or _NO_DUAL_CLIP,
        }
    assert isinstance(config.teacher, LocalTeacherConfig)
    teacher = "distillation.teacher_models.teacher_model"
    return {
        "distillation.enabled": True,
        "distillation.n_gpus_per_node": cluster.teacher_gpus_per_node,
        "distillation.nnodes": cluster.teacher_nodes,
        "distillation.distillation_loss.loss_mode": objective.type,
        # Our token losses hold reward and clipping already; verl adds nothing to them.
        "distillation.distillation_loss.use_task_rewards": False,
        "distillation.distillation_loss.use_policy_gradient": False,
        "distillation.distillation_loss.loss_max_clamp": None,
        f"{teacher}.model_path": model_path(config.teacher.model),
        f"{teacher}.inference.dtype": config.teacher.dtype,
        f"{teacher}.inference.tensor_model_parallel_size": 1,
        f"+ray_kwargs.ray_init.runtime_env.env_vars.{VARIABLE}": objective_json(objective),
    }


def _trainer(config: RunConfig, cluster: Cluster) -> dict[str, Any]:
    every = -(-config.evaluation.every_steps // config.optimization.steps_per_rollout_batch)
    return {
        "trainer.n_gpus_per_node": cluster.gpus_per_node,
        "trainer.nnodes": cluster.nodes,
        "trainer.total_epochs": 1,
        "trainer.total_training_steps": num_rollout_batches(config),
        "trainer.test_freq": every,
        "trainer.save_freq": every,
        "trainer.val_before_train": True,
        "trainer.logger": ["console"],
        "trainer.project_name": "rlad",
        "trainer.experiment_name": config.directory.name,
        "trainer.default_local_dir": InFolder("checkpoints"),
    }


def model_path(name: str) -> str:
    """Where every node finds a model: an absolute folder, or its Hugging Face name as it is."""
    path = Path(located(name))
    return str(path.resolve()) if path.is_dir() else name


def without_equivalent(config: RunConfig) -> list[str]:
    """What verl does differently, or not at all: one sentence each."""
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
        if key in _NOT_CARRIED_OVER:
            notes.append(f"{key} = {value!r} is not carried over: {_NOT_CARRIED_OVER[key]}.")
    return notes
