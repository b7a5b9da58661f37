"""What an update did with each token of a completion, for the report's imitation map."""

from typing import Any

from torch import Tensor

from rlad.objectives.inputs import LossInputs
from rlad.objectives.masks import per_token

FATES = {
    "+": "reinforced: positive advantage, made more likely",
    "h": "held back: positive advantage, gated because the ratio is above 1 + clip_high",
    "-": "punished: negative advantage, made less likely",
    "p": "protected: negative advantage, gated because the ratio is below 1 - clip_low (or above dual_clip)",
    ".": "no advantage, or no finite score: untouched by the surrogate",
}
"""One letter for each thing that the clipped surrogate does with a token. It is the teacher that
holds back and protects where it is in the ratio (TRRD); elsewhere a token is gated because the
student has moved since it sampled."""


def imitation_of(inputs: LossInputs, stats: dict[str, Tensor], row: int) -> dict[str, Any] | None:
    """Of one row of a micro-batch, per token: `fates` and `clamped` (letters), advantages,
    log-ratio to the teacher (nats).

    None for objectives without a clipped surrogate.
    """
    if "gated_positive" not in stats:
        return None
    length = int(inputs.mask[row].sum())
    advantages = per_token(inputs.advantages, inputs.mask)[row, :length].tolist()
    trained, held_back, protected = (
        values[row, :length].tolist()
        for values in (inputs.trained, stats["gated_positive"], stats["gated_negative"])
    )
    fates = [
        "." if not kept or not a else "h" if held else "p" if spared else "+" if a > 0 else "-"
        for a, kept, held, spared in zip(advantages, trained, held_back, protected, strict=True)
    ]
    record: dict[str, Any] = {
        "fates": "".join(fates),
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
