# pyright: reportMissingImports=false
"""The verl plug-in: our objectives as verl's distillation losses.

`import verl` loads it (entry point group `verl.plugins`). It translates verl's TensorDict into
LossInputs and returns token losses; sampling, teacher, advantages, aggregation and the optimiser
are verl's. On this route verl adds neither KL leash nor rollout importance weights: both are added
here, when `actor.use_kl_loss` and `algorithm.rollout_correction.rollout_is` ask for them.
"""

from typing import Any

import torch
from torch import Tensor
from verl.trainer.distillation.losses import (
    DISTILLATION_LOSS_REGISTRY,
    DistillationLossSettings,
    register_distillation_loss,
)
from verl.utils import tensordict_utils
from verl.utils.metric import AggregationType, Metric
from verl.workers.utils.padding import no_padding_2_padding

from rlad.engines.verl.objective import NAMES, objective_knobs_from_environment
from rlad.errors import UserError
from rlad.objectives import token_loss
from rlad.objectives.inputs import LossInputs
from rlad.scoring.distributions import float32_or_wider

NEEDED = ("response_mask", "old_log_probs", "advantages", "teacher_logprobs")


def rlad_loss(
    config: Any, distillation_config: Any, model_output: Any, data: Any
) -> tuple[Tensor, dict[str, Any]]:
    """Compute the token losses `[batch, token]` of the objective named by `loss_mode`, and its
    metrics. The arguments are those of verl's losses.

    Raises `UserError` for settings that have no meaning here, and for missing tensors.
    """
    settings = distillation_config.distillation_loss
    _require_meaning(config, settings, data)
    inputs = _translate(config, model_output, data)
    knobs = objective_knobs_from_environment(settings.loss_mode)
    kl_coef = config.kl_loss_coef if config.use_kl_loss else 0.0
    losses, stats = token_loss(settings.loss_mode, inputs, knobs=knobs, kl_coef=kl_coef)
    return losses, _metrics(stats, inputs.mask, data)


def _translate(config: Any, model_output: Any, data: Any) -> LossInputs:
    """Collect the objective's inputs, with rollout weights if verl has computed them."""
    # verl computes without padding; our losses take padded tensors [batch, token].
    student = no_padding_2_padding(model_output["log_probs"], data)
    student = student.to(float32_or_wider(student.dtype))
    teacher = no_padding_2_padding(data["teacher_logprobs"], data).squeeze(-1)
    optional = [name for name in ("ref_log_prob", "rollout_is_weights") if name in data]
    padded = data.select(
        "response_mask", "old_log_probs", "advantages", *optional
    ).to_padded_tensor()
    return LossInputs(
        student_logprobs=student,
        old_logprobs=padded["old_log_probs"].to(student),
        advantages=padded["advantages"].to(student),
        mask=padded["response_mask"].bool(),
        teacher_logprobs=teacher.to(student),
        reference_logprobs=padded["ref_log_prob"].to(student) if config.use_kl_loss else None,
        rollout_weights=padded["rollout_is_weights"].to(student)
        if "rollout_is_weights" in optional
        else None,
    )


def _require_meaning(config: Any, settings: Any, data: Any) -> None:
    """Raise `UserError` for the first setting or tensor that does not fit the objective."""
    needed = (*NEEDED, "ref_log_prob") if config.use_kl_loss else NEEDED
    if missing := [name for name in needed if name not in data]:
        raise UserError(
            f"objective {settings.loss_mode!r} of rlad needs {', '.join(missing)}, which verl's "
            "batch does not have; enable distillation."
        )
    temperature = torch.as_tensor(tensordict_utils.get_non_tensor_data(data, "temperature", 1.0))
    # verl's teacher always scores at temperature 1; the objective is a complete loss of its own.
    must_be = [
        ("distillation.distillation_loss.use_task_rewards", settings.use_task_rewards, False),
        ("distillation.distillation_loss.use_policy_gradient", settings.use_policy_gradient, False),
        ("distillation.distillation_loss.loss_max_clamp", settings.loss_max_clamp, None),
        ("actor_rollout_ref.actor.entropy_coeff", config.entropy_coeff, 0),
        ("actor_rollout_ref.rollout.temperature", set(temperature.flatten().tolist()), {1.0}),
    ]
    if config.use_kl_loss:
        must_be += [("actor_rollout_ref.actor.kl_loss_type", config.kl_loss_type, "low_var_kl")]
    for what, value, wanted in must_be:
        if value != wanted:
            raise UserError(
                f"{what}: {value}; for objective {settings.loss_mode!r} of rlad it must be "
                f"{wanted}."
            )


def _metrics(stats: dict[str, Tensor], mask: Tensor, data: Any) -> dict[str, Any]:
    """Return this micro-batch's part of the means over the response tokens of the global
    mini-batch. verl adds micro-batches and averages over data-parallel ranks."""
    # The number of tokens is that of all ranks, so each rank divides by an equal share of it.
    denominator = float(data["batch_num_tokens"]) / data["dp_size"]
    totals = {
        name: values.detach()[mask].sum(dtype=torch.float32) for name, values in stats.items()
    }
    return {
        f"rlad/{name}/mean": Metric(AggregationType.SUM, total / denominator)
        for name, total in totals.items()
    }


def register() -> None:
    """Register our objectives with verl; verl itself raises an error for a name already taken."""
    if not all(DISTILLATION_LOSS_REGISTRY.get(name) is rlad_loss for name in NAMES):
        register_distillation_loss(DistillationLossSettings(names=list(NAMES), use_estimator=True))(
            rlad_loss
        )


register()
