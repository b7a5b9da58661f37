"""The objectives: pure functions from tensors to a loss per token, and a table of them.

Every objective has the signature of `trrd_loss`: keyword tensors `[batch, token]` in, `(token_loss,
stats)` out. An engine computes the tensors in `needs`, calls `token_loss`, and divides in
`rlad.objectives.aggregate`. All mathematics of a loss is in this folder.
"""

import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rlad.objectives.distilled_rl import distilled_rl_loss
from rlad.objectives.divergences import (
    Divergence,
    clipped_divergence_of,
    divergence_of,
    gkd_divergence,
    reverse_kl,
)
from rlad.objectives.gkd import gkd_loss
from rlad.objectives.grpo import grpo_loss
from rlad.objectives.inputs import LossInputs
from rlad.objectives.kdrl import kdrl_loss
from rlad.objectives.kl import kl_tokens
from rlad.objectives.masks import clean, keep_finite
from rlad.objectives.mopd import mopd_loss
from rlad.objectives.opd import opd_loss
from rlad.objectives.opsd import opsd_loss
from rlad.objectives.rlsd import rlsd_loss
from rlad.objectives.sdpo import sdpo_loss
from rlad.objectives.sft import sft_loss
from rlad.objectives.skill_sd import skill_sd_loss
from rlad.objectives.srpo import srpo_loss
from rlad.objectives.topd import topd_advantages, topd_loss
from rlad.objectives.trrd import trrd_loss

TokenLoss = tuple[Tensor, dict[str, Tensor]]


@dataclass(frozen=True, slots=True)
class Objective:
    """One row of the table. `needs` names the fields of `LossInputs` that `function` takes."""

    function: Callable[..., TokenLoss]
    needs: tuple[str, ...]
    paper: str
    takes_too: tuple[str, ...] = ()
    """Fields of `LossInputs` that `function` takes if they are given."""
    token_advantages: Callable[..., Tensor] | None = None
    """Computes the advantages [batch, token] of whole groups, instead of those from rewards."""
    divergence: Callable[..., Divergence] | None = None
    """Makes the divergence that `divergence_to_teacher` holds from the objective's settings; see
    `rlad.objectives.divergences`."""

    @property
    def formula(self) -> str:
        """The formula below the title of the objective's file."""
        doc = inspect.getdoc(sys.modules[self.function.__module__]) or ""
        return doc.split("\n\n")[1]


_RATIO = ("student_logprobs", "old_logprobs", "advantages", "mask")
_SILENCE = ("teacher_speaks",)
OBJECTIVES: dict[str, Objective] = {
    "trrd": Objective(
        trrd_loss,
        (*_RATIO, "teacher_logprobs"),
        "arXiv 2602.22495",
        takes_too=("role_evidence", *_SILENCE),
    ),
    "grpo": Objective(grpo_loss, _RATIO, "arXiv 2402.03300"),
    "kdrl": Objective(
        kdrl_loss,
        _RATIO,
        "arXiv 2506.02208",
        takes_too=("teacher_logprobs", "divergence_to_teacher", *_SILENCE),
        divergence=reverse_kl,
    ),
    "opd": Objective(
        opd_loss,
        ("student_logprobs", "old_logprobs", "teacher_logprobs", "mask"),
        "arXiv 2505.09388",
    ),
    "rlsd": Objective(
        rlsd_loss, (*_RATIO, "teacher_logprobs"), "arXiv 2604.03128", takes_too=_SILENCE
    ),
    "srpo": Objective(srpo_loss, (*_RATIO, "role_evidence"), "arXiv 2605.07274"),
    "distilled_rl": Objective(
        distilled_rl_loss, (*_RATIO, "teacher_logprobs"), "arXiv 2607.17247", takes_too=_SILENCE
    ),
    "topd": Objective(
        topd_loss,
        (*_RATIO, "teacher_logprobs"),
        "arXiv 2607.04751",
        token_advantages=topd_advantages,
    ),
    "sft": Objective(sft_loss, ("student_logprobs", "mask"), "arXiv 1606.07947"),
    "gkd": Objective(
        gkd_loss,
        ("divergence_to_teacher", "mask"),
        "arXiv 2306.13649",
        divergence=gkd_divergence,
    ),
    "sdpo": Objective(
        sdpo_loss,
        (*_RATIO, "divergence_to_teacher"),
        "arXiv 2601.20802",
        takes_too=("teacher_logprobs", *_SILENCE),
        divergence=divergence_of,
    ),
    "mopd": Objective(
        mopd_loss,
        (*_RATIO, "divergence_to_teacher"),
        "arXiv 2605.12652",
        takes_too=("teacher_logprobs", *_SILENCE),
        divergence=divergence_of,
    ),
    "opsd": Objective(
        opsd_loss,
        ("student_logprobs", "old_logprobs", "divergence_to_teacher", "mask"),
        "arXiv 2601.18734",
        takes_too=_SILENCE,
        divergence=clipped_divergence_of,
    ),
    "skill_sd": Objective(
        skill_sd_loss, (*_RATIO, "teacher_logprobs"), "arXiv 2604.10674", takes_too=_SILENCE
    ),
}


def taken_by(function: Callable[..., Any], knobs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that are arguments of a function."""
    parameters = inspect.signature(function).parameters
    return {name: value for name, value in knobs.items() if name in parameters}


def token_loss(
    name: str, inputs: LossInputs, *, knobs: Mapping[str, Any] | None = None, kl_coef: float = 0.0
) -> TokenLoss:
    """Compute rollout_weights * token loss of an objective + kl_coef * k3 estimate of KL(πS ||
    πref).

    The second term is the KL leash, the same for all objectives. `knobs` are the objective's own
    keyword arguments. Raises `ValueError` if a tensor that it needs is missing.
    """
    row = OBJECTIVES[name]
    needed = (*row.needs, "reference_logprobs") if kl_coef else row.needs
    missing = [field for field in needed if getattr(inputs, field) is None]
    if missing:
        raise ValueError(
            f"objective {name!r} needs {', '.join(missing)}, which LossInputs was given without."
        )
    given = [*row.needs, *(field for field in row.takes_too if getattr(inputs, field) is not None)]
    loss, stats = row.function(
        **{field: getattr(inputs, field) for field in given}, **(knobs or {})
    )
    if inputs.rollout_weights is not None:
        loss = loss * clean(inputs.rollout_weights, inputs.mask & ~stats["dropped"])
    if kl_coef:
        assert inputs.reference_logprobs is not None
        kept = keep_finite(inputs.mask & ~stats["dropped"], inputs.reference_logprobs)
        student = clean(inputs.student_logprobs, kept)
        reference = clean(inputs.reference_logprobs, kept)
        kl = kl_tokens(student, reference, estimator="k3")
        loss = clean(loss, kept) + kl_coef * kl
        stats = stats | {"kl_to_reference": kl.detach(), "dropped": inputs.mask & ~kept}
    return loss, stats
