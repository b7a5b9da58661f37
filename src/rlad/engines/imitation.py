"""Record what an update did with each token of a completion, for the report's imitation map."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from rlad.objectives.inputs import LossInputs
from rlad.objectives.masks import per_token

FATES = {
    "+": "reinforced: positive advantage, made more likely",
    "h": "held back: positive advantage, gated because the ratio is above 1 + clip_high",
    "-": "punished: negative advantage, made less likely",
    "p": (
        "protected: negative advantage, gated because the ratio is below 1 - clip_low "
        "(or above dual_clip)"
    ),
    ".": "no advantage, or no finite score: untouched by the surrogate",
    "e": "written by the environment: read, never trained on",
}
"""One letter for each effect of the clipped surrogate on a token. With the teacher in the ratio
(TRRD), it is the teacher that holds back and protects. Otherwise a token is gated because the
student was updated since it sampled."""


class ImitationMap:
    """A record of what an update does with the tokens of one group. `first_row` is the row of its
    first rollout in the batch."""

    def __init__(self, first_row: int, group_size: int):
        self.rows = range(first_row, first_row + group_size)
        self.of_rollout: dict[int, Any] = {}
        """By the rollout's index in its group."""

    def add(
        self,
        rows: Sequence[int],
        inputs: LossInputs,
        stats: dict[str, Tensor],
        actions: Sequence[Tensor],
    ) -> None:
        """Add a micro-batch with the rollouts `rows`; `actions` is True for tokens that the model
        wrote."""
        for place, row in enumerate(rows):
            if row in self.rows:
                record = imitation_of(inputs, stats, place, actions[place])
                self.of_rollout[row - self.rows.start] = record


def imitation_of(
    inputs: LossInputs, stats: dict[str, Tensor], row: int, actions: Tensor | None = None
) -> dict[str, Any] | None:
    """Return for each token of one row of a micro-batch: `fates` and `clamped` (letters),
    advantages, log-ratio to the teacher (nats).

    Returns None for objectives without a clipped surrogate.
    """
    if "gated_positive" not in stats:
        return None
    if actions is None:
        actions = inputs.mask[row][inputs.mask[row]]
    length = len(actions)
    advantages = per_token(inputs.advantages, inputs.mask)[row, :length].tolist()
    trained = inputs.trained[row, :length].tolist()
    held_back = stats["gated_positive"][row, :length].tolist()
    protected = stats["gated_negative"][row, :length].tolist()
    record: dict[str, Any] = {
        "fates": "".join(map(_fate, actions.tolist(), advantages, trained, held_back, protected)),
        "advantages": [round(a, 3) for a in advantages],
    }
    if "clamped" in stats:
        record["clamped"] = "".join(
            "c" if c else "." for c in stats["clamped"][row, :length].tolist()
        )
    if "log_ratio_to_teacher" in stats:
        record["log_ratio_to_teacher"] = [
            round(x, 3) for x in stats["log_ratio_to_teacher"][row, :length].tolist()
        ]
    return record


def _fate(
    is_action: bool, advantage: float, is_trained: bool, is_held_back: bool, is_protected: bool
) -> str:
    if not is_action:
        return "e"
    if not is_trained or not advantage:
        return "."
    if is_held_back:
        return "h"
    if is_protected:
        return "p"
    return "+" if advantage > 0 else "-"
