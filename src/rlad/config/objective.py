"""The settings of each objective, and the facts about it. Imports no torch."""

import math
from collections.abc import Iterable
from typing import Annotated, ClassVar, Literal, get_args

from pydantic import AfterValidator, Field

from rlad.config.distributions import GKDConfig, MOPDConfig, OPSDConfig, SDPOConfig, SkillSDConfig
from rlad.config.objective_section import Clipped, EngineName, ObjectiveSection, SometimesTaught
from rlad.config.template import template_names
from rlad.config.types import (
    AnnealedNonNegative,
    AnnealedShare,
    Count,
    NonNegative,
    Positive,
    Share,
    ShareBelowOne,
    Support,
)
from rlad.errors import UserError


def _names_the_prompt(template: str) -> str:
    if template_names(template) != {"prompt"}:
        raise UserError(
            f"{template!r} must name {{prompt}} and nothing else; write for example "
            "'{prompt}\\nThink between <reasoning> and </reasoning>.'"
        )
    return template


class _GRPOLike(Clipped):
    """The settings of GRPO, and of objectives that differ only in the ratio's denominator."""

    ratio_level: Literal["token", "sequence"] = "token"
    """one ratio for each token, or one for the whole sequence (GSPO)"""
    dual_clip: Annotated[float, Field(strict=True, gt=1)] | None = None
    """bound on the ratio for negative advantages, above 1; by default no bound"""

    zero_advantage_is_zero_gradient: ClassVar[bool] = True


class RoleWeights(ObjectiveSection):
    """The weights of SRPO. Tokens of perception and reasoning count by how much they depend on the
    picture."""

    evidence_weight: NonNegative | AnnealedNonNegative = 0.0
    """λ of SRPO's token weights; 0 turns them off"""
    weight_clip: ShareBelowOne = 0.2
    """ε_w: a token's weight is clipped to [1 - weight_clip, 1 + weight_clip]"""
    contrast_clip: Positive = 2.0
    """c: largest contrast of a token, in nats"""
    patch_pixels: Count = 14
    """edge of the squares of the picture, in pixels; each is blackened with probability 1/2"""
    reasoning_template: Annotated[str, AfterValidator(_names_the_prompt)] = "{prompt}"
    """prompt for scoring the reasoning without the perception"""


class TRRDConfig(RoleWeights, SometimesTaught, _GRPOLike):
    type: Literal["trrd"] = "trrd"
    alpha: Share | AnnealedShare = 0.5
    """1 is GRPO, with 0 the anchor is the teacher alone"""
    teacher_log_ratio_clip: Positive | Literal["off"] = 1.0
    """c in clamp(log πS - log πT, -c, +c); `off` leaves the log-ratio unbounded"""

    gates_by_teacher: ClassVar[bool] = True

    @property
    def weighs_roles(self) -> bool:
        return self.evidence_weight != 0


class GRPOConfig(_GRPOLike):
    type: Literal["grpo"] = "grpo"

    needs_teacher: ClassVar[bool] = False
    teacher_work: ClassVar[str] = "no teacher"


class KDRLConfig(SometimesTaught, Clipped):
    type: Literal["kdrl"] = "kdrl"
    kd_coef: NonNegative | AnnealedNonNegative = 2e-3
    """weight of the distillation term; KDRL's annealing is start 5e-3, end 1e-3, change_per_step
    -5e-5"""
    kd_estimator: Literal["k2", "k3", "exact", "top_k"] = "k2"
    """estimator of KL(πS || πT): from the sampled token (k2, k3), over the whole vocabulary
    (exact), or over the student's most likely tokens (top_k)"""
    top_k: Count = 100
    """number of tokens for kd_estimator = "top_k"; all others are merged into one"""

    @property
    def asked_of_teacher(self) -> Support:
        supports: dict[str, Support] = {"exact": "full", "top_k": "student_top_k"}
        return supports.get(self.kd_estimator, "sampled")


class OPDConfig(SometimesTaught):
    type: Literal["opd"] = "opd"

    uses_reward: ClassVar[bool] = False


class OPDThenGRPOConfig(Clipped):
    type: Literal["opd_then_grpo"] = "opd_then_grpo"
    opd_share: Share | Literal["auto"] = 0.4
    """share of the run's steps that use `opd`, rounded up to whole rollout batches; the others use
    `grpo`. `auto` uses `opd` until validation pass@1 no longer rises"""
    auto_patience: Count = 3
    """`auto`: number of validations in a row without a gain that end `opd`"""
    auto_min_gain: Share = 0.01
    """`auto`: pass@1 must exceed that of the last gain by more than this to count as a gain"""

    engines: ClassVar[tuple[EngineName, ...]] = ("native",)
    teacher_work: ClassVar[str] = (
        "the teacher scores each sampled token once in the steps with opd, later nothing"
    )

    @property
    def schedule_depends_on_num_steps(self) -> bool:
        return self.opd_share != "auto"

    @property
    def num_deciding_validations(self) -> int | None:
        return self.auto_patience if self.opd_share == "auto" else None

    def flat_step(self, validations: Iterable[tuple[int, float]]) -> int | None:
        if self.opd_share != "auto":
            return None
        best = -math.inf
        num_without_gain = 0
        for step, value in validations:
            if value > best + self.auto_min_gain:
                best = value
                num_without_gain = 0
                continue
            num_without_gain += 1
            if num_without_gain == self.auto_patience:
                return step
        return None

    def at_step(
        self, step: int, num_steps: int, *, flat_step: int | None = None
    ) -> ObjectiveSection:
        if self.opd_share == "auto":
            num_opd_steps = num_steps if flat_step is None else flat_step
        else:
            # Rounded first: 0.07 * 100 is 7.000000000000001.
            num_opd_steps = math.ceil(round(self.opd_share * num_steps, 9))
        if step < num_opd_steps:
            return OPDConfig()
        return GRPOConfig(clip_low=self.clip_low, clip_high=self.clip_high)


class RLSDConfig(SometimesTaught, Clipped):
    type: Literal["rlsd"] = "rlsd"
    teacher_weight: Share | AnnealedShare = AnnealedShare(start=0.5, end=0.0, change_per_step=-0.01)
    """λ: 0 is GRPO, 1 weights every token by the teacher's evidence"""
    weight_clip: Share = 0.2
    """ε_w: the evidence weight is clipped to [1 - weight_clip, 1 + weight_clip]"""

    zero_advantage_is_zero_gradient: ClassVar[bool] = True


class SRPOConfig(RoleWeights, Clipped):
    type: Literal["srpo"] = "srpo"
    evidence_weight: NonNegative | AnnealedNonNegative = 0.5
    """λ: 0 is GRPO"""

    needs_teacher: ClassVar[bool] = False
    teacher_work: ClassVar[str] = "no teacher; the old policy scores three times"
    zero_advantage_is_zero_gradient: ClassVar[bool] = True
    engines: ClassVar[tuple[EngineName, ...]] = ("native",)

    @property
    def weighs_roles(self) -> bool:
        return True


class DistilledRLConfig(SometimesTaught, Clipped):
    type: Literal["distilled_rl"] = "distilled_rl"
    weight_bound: Annotated[float, Field(strict=True, ge=1)] = 3.0
    """πT / πold is clipped to [1 / weight_bound, weight_bound]"""

    zero_advantage_is_zero_gradient: ClassVar[bool] = True


class TOPDConfig(SometimesTaught, Clipped):
    type: Literal["topd"] = "topd"
    alpha: Annotated[float, Field(strict=True, gt=0, lt=1)] = 0.1
    """the teacher's share in the mixture; no token reward is below log(1 - alpha)"""

    uses_reward: ClassVar[bool] = False
    engines: ClassVar[tuple[EngineName, ...]] = ("native",)


class SFTConfig(ObjectiveSection):
    type: Literal["sft"] = "sft"
    rejection: bool = True
    """train only on those of the teacher's completions that the verifier grades as correct"""

    uses_reward: ClassVar[bool] = False
    written_by: ClassVar[Literal["student", "teacher"]] = "teacher"
    engines: ClassVar[tuple[EngineName, ...]] = ("native",)
    teacher_work: ClassVar[str] = "the teacher writes the completions"

    @property
    def counted_rollouts(self) -> Literal["judged", "correct", "all"]:
        return "correct" if self.rejection else "all"


ObjectiveConfig = (
    TRRDConfig
    | GRPOConfig
    | KDRLConfig
    | OPDConfig
    | OPDThenGRPOConfig
    | RLSDConfig
    | SRPOConfig
    | DistilledRLConfig
    | TOPDConfig
    | SFTConfig
    | GKDConfig
    | SDPOConfig
    | MOPDConfig
    | OPSDConfig
    | SkillSDConfig
)
OBJECTIVE_CONFIGS: dict[str, type[ObjectiveSection]] = {
    section.model_fields["type"].default: section for section in get_args(ObjectiveConfig)
}
"""By name."""
