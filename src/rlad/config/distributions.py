"""The knobs of the objectives that compare whole distributions, and of those by which a student
teaches itself."""

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from rlad.config.objective_section import Clipped, EngineName, ObjectiveSection, SometimesTaught
from rlad.config.types import (
    AnnealedNonNegative,
    AnnealedShare,
    Count,
    NonNegative,
    Positive,
    Share,
    Support,
    at_step,
)


class _ComparesDistributions(ObjectiveSection):
    """Compares the distributions of student and teacher at each token."""

    support: Support = "full"
    """which tokens of the vocabulary are told apart: the sampled one alone, the top_k likeliest of
    student or teacher (the others count as one), or all"""
    top_k: Count = 100
    """K of student_top_k and teacher_top_k"""

    teacher_work: ClassVar[str] = (
        "the teacher computes the probabilities of the vocabulary at each sampled token "
        "(objective.support)"
    )

    @property
    def asked_of_teacher(self) -> Support:
        return self.support


class GKDConfig(_ComparesDistributions):
    type: Literal["gkd"] = "gkd"
    beta: Share = 0.5
    """of the generalised Jensen-Shannon divergence: 0 is the forward KL, 1 the reverse KL"""

    uses_reward: ClassVar[bool] = False
    engines: ClassVar[tuple[EngineName, ...]] = ("native",)

    @property
    def is_of_old_policy(self) -> bool:
        return self.support == "sampled"


class _SelfDistillation(_ComparesDistributions):
    divergence: Literal["jsd", "reverse_kl", "forward_kl"] = "jsd"
    """of student and teacher at each token"""
    beta: Annotated[float, Field(strict=True, gt=0, lt=1)] = 0.5
    """of jsd: the teacher's share in the mixture; near equal distributions its gradient is beta
    (1 - beta) of a KL's"""
    max_importance_weight: Positive | Literal["off"] = 2.0
    """πS / πold weighs the divergence up to this; it is 1 with one step on each rollout batch"""

    engines: ClassVar[tuple[EngineName, ...]] = ("native",)


class SDPOConfig(_SelfDistillation, Clipped):
    type: Literal["sdpo"] = "sdpo"
    support: Support = "student_top_k"
    """which tokens of the vocabulary are told apart: the sampled one alone, the top_k likeliest of
    student or teacher (the others count as one), or all"""
    reward_share: Share | AnnealedShare = 0.0
    """share of GRPO's loss, or with teacher_enters = "advantage" of its advantage; the rest is the
    teacher's"""
    teacher_enters: Literal["loss", "advantage"] = "loss"
    """as a divergence in the loss, or as the log-ratio of the sampled token in GRPO's advantage"""

    default_teacher: ClassVar[dict[str, Any] | None] = {
        "type": "privileged",
        "context": {"num_successes": 1, "feedback": True},
        "teacher": {"type": "ema", "update_rate": 0.05, "every_batches": 1},
    }

    def trains_without_teacher(self, step: int) -> bool:
        return at_step(self.reward_share, step) > 0

    def problems(self) -> Iterator[str]:
        is_of_token = self.support == "sampled" and self.divergence == "reverse_kl"
        if self.teacher_enters == "advantage" and not is_of_token:
            yield (
                "teacher_enters = 'advantage' needs support = 'sampled' and divergence = "
                "'reverse_kl': a divergence over several tokens does not depend on which one was "
                "sampled, so as an advantage its expected gradient is 0; set both, or "
                "teacher_enters = 'loss'"
            )


class MOPDConfig(SDPOConfig):
    type: Literal["mopd"] = "mopd"  # type: ignore[assignment]

    default_teacher: ClassVar[dict[str, Any] | None] = {
        "type": "privileged",
        "context": {"num_successes": 2, "num_failures": 1, "feedback": True},
        "teacher": {"type": "ema", "update_rate": 0.05, "every_batches": 1},
    }


class OPSDConfig(_SelfDistillation):
    type: Literal["opsd"] = "opsd"
    divergence: Literal["jsd", "reverse_kl", "forward_kl"] = "forward_kl"
    """of student and teacher at each token"""
    pointwise_clip: Positive | None = None
    """bound of each term of the divergence; none by default, as a bounded token is pushed down
    although the teacher wants it up"""
    clip_gradient: Literal["zero", "straight_through"] = "zero"
    """of a bounded term: its own, which is 0, or that of the term without bound"""

    uses_reward: ClassVar[bool] = False
    default_teacher: ClassVar[dict[str, Any] | None] = {
        "type": "privileged",
        "context": {"answer": True, "solution": True},
        "teacher": {"type": "ema", "update_rate": 0.0},
    }

    def problems(self) -> Iterator[str]:
        if self.pointwise_clip is not None and self.support != "full":
            yield (
                f"pointwise_clip bounds the terms of single tokens, and support = {self.support!r} "
                "joins many; set support = 'full', or leave it out"
            )


class SkillSDConfig(SometimesTaught, Clipped):
    type: Literal["skill_sd"] = "skill_sd"
    kd_coef: NonNegative | AnnealedNonNegative = 1e-3
    """λ: weight of the distillation term"""
    teacher_log_ratio_clip: Positive | Literal["off"] = 5.0
    """c in clamp(log πS - log πT, -c, +c); `off`, as in the paper, leaves it unbounded"""
    max_importance_weight: Positive | Literal["off"] = 2.0
    """bound of πS / πold in the distillation term; `off`, as in the paper: none"""

    engines: ClassVar[tuple[EngineName, ...]] = ("native",)
    default_teacher: ClassVar[dict[str, Any] | None] = {
        "type": "privileged",
        "context": {"skill": {}, "without_success": "plain"},
        "teacher": {"type": "ema", "update_rate": 1.0, "every_batches": 1},
    }
