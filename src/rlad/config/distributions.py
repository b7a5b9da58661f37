"""The settings of objectives that compare whole distributions, and of self-distillation."""

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
    """The base of objectives that compare the distributions of student and teacher at each
    token."""

    support: Support = "full"
    """tokens of the vocabulary that the divergence compares: the sampled one only, the top_k most
    likely of student or teacher (all others are merged into one), or all"""
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
    """β of the generalised Jensen-Shannon divergence: 0 is the forward KL, 1 the reverse KL"""

    uses_reward: ClassVar[bool] = False
    engines: ClassVar[tuple[EngineName, ...]] = ("native",)

    @property
    def is_of_old_policy(self) -> bool:
        return self.support == "sampled"


class _SelfDistillation(_ComparesDistributions):
    divergence: Literal["jsd", "reverse_kl", "forward_kl"] = "jsd"
    """divergence between student and teacher at each token"""
    beta: Annotated[float, Field(strict=True, gt=0, lt=1)] = 0.5
    """for jsd: the teacher's share in the mixture; where the distributions are nearly equal, the
    gradient is beta (1 - beta) times that of a KL"""
    max_importance_weight: Positive | Literal["off"] = 2.0
    """largest weight πS / πold of the divergence; the weight is 1 with one step on each rollout
    batch"""

    engines: ClassVar[tuple[EngineName, ...]] = ("native",)


class SDPOConfig(_SelfDistillation, Clipped):
    type: Literal["sdpo"] = "sdpo"
    support: Support = "student_top_k"
    """tokens of the vocabulary that the divergence compares: the sampled one only, the top_k most
    likely of student or teacher (all others are merged into one), or all"""
    reward_share: Share | AnnealedShare = 0.0
    """weight of GRPO's loss (or of its advantage, with teacher_enters = "advantage"); the rest is
    the teacher's"""
    teacher_enters: Literal["loss", "advantage"] = "loss"
    """where the teacher enters: as a divergence in the loss, or as the log-ratio of the sampled
    token in GRPO's advantage"""

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
    """divergence between student and teacher at each token"""
    pointwise_clip: Positive | None = None
    """bound on each term of the divergence; none by default, since a bounded token is pushed down
    even where the teacher would raise it"""
    clip_gradient: Literal["zero", "straight_through"] = "zero"
    """gradient of a bounded term: 0, or that of the term without the bound"""

    uses_reward: ClassVar[bool] = False
    default_teacher: ClassVar[dict[str, Any] | None] = {
        "type": "privileged",
        "context": {"answer": True, "solution": True},
        "teacher": {"type": "ema", "update_rate": 0.0},
    }

    def problems(self) -> Iterator[str]:
        if self.pointwise_clip is not None and self.support != "full":
            yield (
                f"pointwise_clip bounds the terms of single tokens, but support = {self.support!r} "
                "merges many into one; set support = 'full', or leave pointwise_clip out"
            )


class SkillSDConfig(SometimesTaught, Clipped):
    type: Literal["skill_sd"] = "skill_sd"
    kd_coef: NonNegative | AnnealedNonNegative = 1e-3
    """λ: weight of the distillation term"""
    teacher_log_ratio_clip: Positive | Literal["off"] = 5.0
    """c in clamp(log πS - log πT, -c, +c); `off`, as in the paper, leaves it unbounded"""
    max_importance_weight: Positive | Literal["off"] = 2.0
    """bound on πS / πold in the distillation term; `off`, as in the paper, leaves it unbounded"""

    engines: ClassVar[tuple[EngineName, ...]] = ("native",)
    default_teacher: ClassVar[dict[str, Any] | None] = {
        "type": "privileged",
        "context": {"skill": {}, "without_success": "plain"},
        "teacher": {"type": "ema", "update_rate": 1.0, "every_batches": 1},
    }
