"""A step whose loss or gradient is not finite moves nothing but the schedule of the learning
rate."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from rlad.errors import RunFailedError
from rlad.rollouts.types import Metrics, RolloutGroup

SKIPPED = "optimization/skipped/count"


@dataclass(frozen=True, slots=True)
class SkippedBatch:
    """What a skipped step was made on, for whoever looks for the reason."""

    groups: Sequence[RolloutGroup]
    """of the whole rollout batch"""
    tensors: Mapping[str, Tensor]
    """scores of its rollouts by name, one after the other; empty where the engine keeps none"""


def drop_gradient(parameters: Iterable[nn.Parameter]) -> None:
    """Make the optimiser's next step leave weights and moments as they are; zeros would move them
    by the momentum."""
    for parameter in parameters:
        parameter.grad = None


def metrics_of_skipped(metrics: Metrics) -> Metrics:
    """Keep of a skipped step's metrics those that are finite, and mark it."""
    return {key: value for key, value in metrics.items() if math.isfinite(value)} | {SKIPPED: 1.0}


def require_sound_weights(step: int, parameters: Iterable[Tensor]) -> None:
    """Raise `RunFailedError` unless the weights are finite: with sound ones a batch that overflows
    may be skipped."""
    if not all(bool(parameter.isfinite().all()) for parameter in parameters):
        raise RunFailedError(
            f"step {step}: the student's own log-probs are not finite; its weights are broken: "
            "start a new run with a lower optimization.learning_rate, from an earlier checkpoint "
            "as student.model."
        )
