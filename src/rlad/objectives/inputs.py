"""The named tensors that an objective may read."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from rlad.objectives.masks import heard_tokens, keep_finite

_WITH_GRADIENT = ("student_logprobs", "divergence_to_teacher")


@dataclass(frozen=True, slots=True)
class LossInputs:
    """The tensors that an objective may read, each `[batch, token]` unless stated otherwise. They
    are validated on creation.

    Log-probs are those of the sampled completion tokens at the sampling temperature, float32 or
    wider. Only `student_logprobs` and `divergence_to_teacher` may carry a gradient.
    """

    student_logprobs: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    """`[batch]` or `[batch, token]`"""
    mask: Tensor
    """bool; True for a completion token that is trained on"""
    teacher_logprobs: Tensor | None = None
    reference_logprobs: Tensor | None = None
    """log-probs of the initial student; only for the KL leash"""
    teacher_speaks: Tensor | None = None
    """bool `[batch]`: the completions on which the teacher is used; None: all. The teacher's values
    for the others have no meaning"""
    divergence_to_teacher: Tensor | None = None
    """divergence of the distributions of student and teacher at each token"""
    role_evidence: Tensor | None = None
    """difference that the evidence of a token's role (the picture, or the perception) makes to its
    log-prob; NaN for a token without a role"""
    rollout_weights: Tensor | None = None
    """πold / πrollout, already bounded, if the completions were not sampled from the old policy;
    they multiply the objective's loss of each token, not the KL leash"""

    def __post_init__(self) -> None:
        shape = self.mask.shape
        if self.mask.dtype != torch.bool or self.mask.dim() != 2:
            raise ValueError(
                f"mask is {self.mask.dtype} of shape {tuple(shape)}; a bool tensor [batch, token] "
                "is needed: write `mask.bool()`."
            )
        of_rows = {
            "advantages": (shape, shape[:1]),
            "teacher_speaks": (shape[:1],),
        }
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None or field.name == "mask":
                continue
            allowed = of_rows.get(field.name, (shape,))
            if value.shape not in allowed:
                need = " or ".join(str(tuple(good)) for good in allowed)
                raise ValueError(
                    f"{field.name} has shape {tuple(value.shape)}; with a mask {tuple(shape)} it "
                    f"must be {need}."
                )
            if value.requires_grad and field.name not in _WITH_GRADIENT:
                raise ValueError(
                    f"{field.name} carries a gradient; only {' and '.join(_WITH_GRADIENT)} may: "
                    "call `.detach()` on it."
                )

    @property
    def trained(self) -> Tensor:
        """The tokens of the mask at which all values to compare with the student are finite; the
        teacher's count only where it is used."""
        given = (self.old_logprobs, self.reference_logprobs)
        kept = keep_finite(self.mask, *(value for value in given if value is not None))
        heard = self.heard
        for value in (self.teacher_logprobs, self.divergence_to_teacher):
            if value is not None:
                kept = kept & (torch.isfinite(value.detach()) | ~heard)
        return kept

    @property
    def heard(self) -> Tensor:
        """The tokens of the mask on which the teacher is used."""
        return heard_tokens(self.mask, self.teacher_speaks)
