"""The named tensors that an objective may read."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from rlad.objectives.masks import heard_tokens, keep_finite

_WITH_GRADIENT = ("student_logprobs", "divergence_to_teacher")


@dataclass(frozen=True, slots=True)
class LossInputs:
    """What an objective may read; every tensor `[batch, token]` unless said. Validated on creation.

    Log-probs are those of the sampled completion tokens, divided by the sampling temperature,
    float32 or wider. Only what is the student's may carry a gradient: `student_logprobs` and
    `divergence_to_teacher`.
    """

    student_logprobs: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    """`[batch]` or `[batch, token]`"""
    mask: Tensor
    """bool; True = completion token that is trained on"""
    teacher_logprobs: Tensor | None = None
    reference_logprobs: Tensor | None = None
    """of the initial student; only for the KL leash"""
    teacher_speaks: Tensor | None = None
    """bool `[batch]`: the completions on which the teacher has a say; None: all. What its tensors
    hold of the others means nothing"""
    divergence_to_teacher: Tensor | None = None
    """of the whole distributions of student and teacher at each token"""
    role_evidence: Tensor | None = None
    """what a token's log-prob owes to the evidence of its role, the picture or what was seen in it;
    NaN where it has no role"""
    rollout_weights: Tensor | None = None
    """πold / πrollout where another sampler than the old policy wrote the completions, bounded by
    whoever made them; they multiply the objective's loss of each token, not the KL leash"""

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
        """The tokens of the mask at which all that is compared with the student is finite; of the
        teacher's where it speaks."""
        given = (self.old_logprobs, self.reference_logprobs)
        kept = keep_finite(self.mask, *(value for value in given if value is not None))
        heard = self.heard
        for value in (self.teacher_logprobs, self.divergence_to_teacher):
            if value is not None:
                kept = kept & (torch.isfinite(value.detach()) | ~heard)
        return kept

    @property
    def heard(self) -> Tensor:
        """The tokens of the mask on which the teacher has a say."""
        return heard_tokens(self.mask, self.teacher_speaks)
