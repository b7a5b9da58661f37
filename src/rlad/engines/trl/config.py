"""`RLADConfig`: TRL's `GRPOConfig` with one of our objectives instead of some of its settings."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from trl.trainer.grpo_config import GRPOConfig

from rlad.config.capabilities import require_engine
from rlad.config.engine import REPLACED
from rlad.config.file import parse_objective
from rlad.errors import UserError
from rlad.objectives.aggregate import Aggregation

AGGREGATION: dict[str, Aggregation] = {
    "grpo": "sequence_mean",
    "dapo": "token_mean",
    "bnpo": "token_mean",
    "dr_grpo": "constant_length",
}
"""Our aggregation mode for each of TRL's loss types whose ratio has the same meaning as ours."""


@dataclass
class RLADConfig(GRPOConfig):
    """A `GRPOConfig` with an objective. On a machine without an accelerator, bf16 and gradient
    checkpointing are off by default."""

    _VALID_DICT_FIELDS: ClassVar = [*GRPOConfig._VALID_DICT_FIELDS, "objective"]

    objective: dict[str, Any] | str = "trrd"
    """name of the objective, or its section as in a run's TOML: {'type': 'trrd', 'alpha': 0.5}"""
    advantages: Literal["trl", "rlad"] = "trl"
    """advantages as in TRL (sample standard deviation), or as in the native engine (population
    standard deviation; completions that no reward function judges are not trained on)"""
    max_missing_teacher_share: float = 0.05
    """share of a generation batch's tokens that may lack a teacher log-prob"""
    teacher_tokens_per_batch: int = 16_384
    """most tokens (with padding) in one forward pass of a local teacher"""
    teacher_is_sharded: bool = False
    """shard a teacher given as a model or its name over the processes (FSDP2), instead of one
    replica per process"""
    teacher_dtype: str = "float32"
    """data type of the weights of a teacher that is given by name"""
    use_bias_correction_kl: bool = False
    """not available: see `beta`"""
    gradient_checkpointing: bool | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    """recompute activations in the backward pass; by default on, and off on the CPU"""

    def __post_init__(self) -> None:
        # TRL turns both on by default, which suits a GPU.
        on_cpu = self.use_cpu or not torch.accelerator.is_available()
        if self.bf16 is None and on_cpu:
            self.bf16 = False
        if self.gradient_checkpointing is None:
            self.gradient_checkpointing = not on_cpu
        super().__post_init__()
        objective = {"type": self.objective} if isinstance(self.objective, str) else self.objective
        # A plain dictionary: trackers and checkpoints write the arguments as JSON.
        self.objective = parse_objective(objective).model_dump()
        require_engine("trl", self.objective_config)
        if problem := next(self._problems(), None):
            raise UserError(problem)

    @property
    def objective_config(self) -> Any:
        assert isinstance(self.objective, dict)
        return parse_objective(self.objective)

    @property
    def aggregation(self) -> Aggregation:
        return AGGREGATION[self.loss_type]

    def _problems(self) -> Iterator[str]:
        """Yield a sentence for each setting that has no meaning with our loss or advantages."""
        objective = self.objective_config.type
        allowed = {"advantages": ("trl", "rlad"), "loss_type": tuple(AGGREGATION)}
        if self.advantages == "rlad":
            # Ours compare weighted sums of rewards within the completions of one prompt.
            allowed["multi_objective_aggregation"] = ("sum_then_normalize",)
            allowed["scale_rewards"] = ("group", "none")
        for name, values in allowed.items():
            if (value := getattr(self, name)) not in values:
                yield (
                    f"{name} = {value!r} has no meaning with objective {objective!r} and "
                    f"advantages = {self.advantages!r}; use {' or '.join(map(repr, values))}."
                )
        if self.advantages == "rlad" and self.num_generations_eval == 1:
            yield (
                "num_generations_eval = 1 gives one completion per prompt, but advantages = 'rlad' "
                "compare those of one prompt; set it to at least 2, or advantages = 'trl'."
            )
        for name, (neutral, instead) in REPLACED.items():
            if (value := getattr(self, name)) != neutral:
                yield (
                    f"{name} = {value!r} belongs to TRL's own loss, which objective {objective!r} "
                    f"replaces; it must stay {neutral!r}: {instead}."
                )
