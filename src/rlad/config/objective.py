"""The knobs of each objective, and what else is known of it. Imports no torch."""

import math
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import AfterValidator, Field

from rlad.config.template import template_names
from rlad.config.types import (
    AnnealedNonNegative,
    AnnealedShare,
    Count,
    NonNegative,
    Positive,
    Section,
    Share,
    ShareBelowOne,
    Support,
    at_step,
)
from rlad.errors import UserError

EngineName = Literal["native", "trl", "verl"]
TeacherOn = Literal["all", "positive", "wrong", "failed_groups"]


def _names_the_prompt(template: str) -> str:
    if template_names(template) != {"prompt"}:
        raise UserError(
            f"{template!r} must name {{prompt}} and nothing else; write for example "
            "'{prompt}\\nThink between <reasoning> and </reasoning>.'"
        )
    return template


_NO_KNOBS = ("type", "teacher_on", "support", "top_k", "patch_pixels", "reasoning_template")
"""settings that are no arguments of an objective's function"""


class ObjectiveSection(Section):
    """The base of all objectives. Its class variables are facts about an objective, which engines,
    checks, guards and reports read; nobody compares an objective's name."""

    type: Any = None  # first, so that it comes first wherever settings are shown

    needs_teacher: ClassVar[bool] = True
    uses_reward: ClassVar[bool] = True
    zero_advantage_is_zero_gradient: ClassVar[bool] = False
    """A completion with advantage 0 contributes exactly nothing, so it may be left out of scoring
    and update."""
    written_by: ClassVar[Literal["student", "teacher"]] = "student"
    """Who writes the completions that are trained on."""
    gates_by_teacher: ClassVar[bool] = False
    """Whether the teacher decides for single tokens that they get no gradient."""
    engines: ClassVar[tuple[EngineName, ...]] = ("native", "trl", "verl")
    """On which it runs; `trl` is `RLADTrainer`."""
    teacher_work: ClassVar[str] = "the teacher scores each sampled token once"
    weighs_roles: ClassVar[bool] = False
    """Whether the old policy scores completions without the picture, and without what they see."""
    default_teacher: ClassVar[dict[str, Any] | None] = None
    """The [teacher] section that the choice of it brings along, where none is given beside it."""

    @property
    def asked_of_teacher(self) -> Support:
        """Of which tokens the teacher that scores is asked for probabilities."""
        return "sampled"

    @property
    def counted_rollouts(self) -> Literal["judged", "correct", "all"]:
        """Which rollouts the denominator of the loss counts; no other one trains."""
        return "judged" if self.uses_reward else "all"

    @property
    def schedule_depends_on_num_steps(self) -> bool:
        """Whether its first steps would be others in a run of another length."""
        return False

    @property
    def is_of_old_policy(self) -> bool:
        """Whether its estimate holds for the policy that sampled alone: it has no πS / πold."""
        return False

    @property
    def asks_teacher_on(self) -> TeacherOn:
        """Which completions the teacher is asked about."""
        return "all"

    def trains_without_teacher(self, step: int) -> bool:
        """Whether a completion on which the teacher is silent trains at a step: by its reward."""
        return self.uses_reward

    def knobs_at(self, step: int) -> dict[str, Any]:
        """The keyword arguments of the objective's function at a step; "off" is None."""
        knobs = {key: at_step(value, step) for key, value in self if key not in _NO_KNOBS}
        return {key: None if value == "off" else value for key, value in knobs.items()}

    def flat_step(self, validations: Iterable[tuple[int, float]]) -> int | None:
        """The step after which the objective changes, as the validations (step, pass@1) so far have
        it; None where they do not, or do not decide."""
        return None

    def at_step(
        self, step: int, num_steps: int, *, flat_step: int | None = None
    ) -> "ObjectiveSection":
        """The objective of one optimiser step (from 0) of a run of `num_steps`, of which the
        validations have decided `flat_step`."""
        return self


class _SometimesTaught(ObjectiveSection):
    teacher_on: TeacherOn = "all"
    """completions on which the teacher has a say: all, those of positive advantage, those that are
    not correct, or those of groups without a correct one"""

    @property
    def is_of_old_policy(self) -> bool:
        """Whether its estimate holds for the policy that sampled alone: it has no πS / πold."""
        return False

    @property
    def asks_teacher_on(self) -> TeacherOn:
        return self.teacher_on


class _Clipped(ObjectiveSection):
    clip_low: NonNegative = 0.2
    """the ratio is clipped to [1 - clip_low, 1 + clip_high]"""
    clip_high: NonNegative = 0.28
    """see clip_low"""


class _GRPOLike(_Clipped):
    """GRPO, and what is GRPO but for the denominator of the ratio."""

    ratio_level: Literal["token", "sequence"] = "token"
    """a ratio for each token, or one for the sequence (GSPO)"""
    dual_clip: Annotated[float, Field(strict=True, gt=1)] | None = None
    """bound of the loss of negative advantages, above 1; none by default"""

    zero_advantage_is_zero_gradient: ClassVar[bool] = True


class TRRDConfig(_SometimesTaught, _GRPOLike):
    type: Literal["trrd"] = "trrd"
    alpha: Share | AnnealedShare = 0.5
    """1 is GRPO, 0 is anchored to the teacher alone"""
    teacher_log_ratio_clip: Positive | Literal["off"] = 1.0
    """c in clamp(log πS - log πT, -c, +c); `off` leaves the log-ratio unbounded"""

    gates_by_teacher: ClassVar[bool] = True


class GRPOConfig(_GRPOLike):
    type: Literal["grpo"] = "grpo"

    needs_teacher: ClassVar[bool] = False
    teacher_work: ClassVar[str] = "no teacher"


class KDRLConfig(_SometimesTaught, _Clipped):
    type: Literal["kdrl"] = "kdrl"
    kd_coef: NonNegative | AnnealedNonNegative = 2e-3
    """weight of the distillation term; KDRL's annealing is start 5e-3, end 1e-3, change_per_step
    -5e-5"""
    kd_estimator: Literal["k2", "k3", "exact", "top_k"] = "k2"
    """of KL(πS || πT): from the sampled token (k2, k3), over the whole vocabulary (exact), or over
    the student's likeliest tokens (top_k)"""
    top_k: Count = 100
    """tokens that top_k tells apart; the others count as one"""

    @property
    def asked_of_teacher(self) -> Support:
        supports: dict[str, Support] = {"exact": "full", "top_k": "student_top_k"}
        return supports.get(self.kd_estimator, "sampled")


class OPDConfig(_SometimesTaught):
    type: Literal["opd"] = "opd"

    uses_reward: ClassVar[bool] = False


class OPDThenGRPOConfig(_Clipped):
    type: Literal["opd_then_grpo"] = "opd_then_grpo"
    opd_share: Share | Literal["auto"] = 0.4
    """share of the run's steps with `opd`, rounded up to whole rollout batches; the rest is
    `grpo`. `auto`: until pass@1 of the validations is flat"""
    auto_patience: Count = 3
    """`auto`: so many validations in a row without a gain end `opd`"""
    auto_min_gain: Share = 0.01
    """`auto`: a gain exceeds the last gain's pass@1 by more than this"""

    engines: ClassVar[tuple[EngineName, ...]] = ("native",)
    teacher_work: ClassVar[str] = (
        "the teacher scores each sampled token once in the steps with opd, later nothing"
    )

    @property
    def schedule_depends_on_num_steps(self) -> bool:
        return self.opd_share != "auto"

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


class RLSDConfig(_SometimesTaught, _Clipped):
    type: Literal["rlsd"] = "rlsd"
    teacher_weight: Share | AnnealedShare = AnnealedShare(start=0.5, end=0.0, change_per_step=-0.01)
    """λ: 0 is GRPO, 1 weighs every token by the teacher's evidence"""
    weight_clip: Share = 0.2
    """ε_w: the evidence weight is clipped to [1 - weight_clip, 1 + weight_clip]"""

    zero_advantage_is_zero_gradient: ClassVar[bool] = True


class SRPOConfig(_Clipped):
    type: Literal["srpo"] = "srpo"
    evidence_weight: NonNegative | AnnealedNonNegative = 0.5
    """λ: 0 is GRPO"""
    weight_clip: ShareBelowOne = 0.2
    """ε_w: a token's weight is clipped to [1 - weight_clip, 1 + weight_clip]"""
    contrast_clip: Positive = 2.0
    """c: the contrast of a token counts up to this, in nats"""
    patch_pixels: Count = 14
    """edge of the squares of the picture that are blackened, each with probability 1/2"""
    reasoning_template: Annotated[str, AfterValidator(_names_the_prompt)] = "{prompt}"
    """the prompt under which the reasoning is scored without the perception"""

    needs_teacher: ClassVar[bool] = False
    teacher_work: ClassVar[str] = "no teacher; the old policy scores three times"
    zero_advantage_is_zero_gradient: ClassVar[bool] = True
    weighs_roles: ClassVar[bool] = True
    engines: ClassVar[tuple[EngineName, ...]] = ("native",)


class DistilledRLConfig(_SometimesTaught, _Clipped):
    type: Literal["distilled_rl"] = "distilled_rl"
    weight_bound: Annotated[float, Field(strict=True, ge=1)] = 3.0
    """πT / πold is clipped to [1 / weight_bound, weight_bound]"""

    zero_advantage_is_zero_gradient: ClassVar[bool] = True


class TOPDConfig(_SometimesTaught, _Clipped):
    type: Literal["topd"] = "topd"
    alpha: Annotated[float, Field(strict=True, gt=0, lt=1)] = 0.1
    """share of the teacher in the mixture; no token reward is below log(1 - alpha)"""

    uses_reward: ClassVar[bool] = False
    engines: ClassVar[tuple[EngineName, ...]] = ("native",)


class SFTConfig(ObjectiveSection):
    type: Literal["sft"] = "sft"
    rejection: bool = True
    """train on those of the teacher's completions alone that the verifier calls correct"""

    uses_reward: ClassVar[bool] = False
    written_by: ClassVar[Literal["student", "teacher"]] = "teacher"
    engines: ClassVar[tuple[EngineName, ...]] = ("native",)
    teacher_work: ClassVar[str] = "the teacher writes the completions"

    @property
    def counted_rollouts(self) -> Literal["judged", "correct", "all"]:
        return "correct" if self.rejection else "all"


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


class SDPOConfig(_SelfDistillation, _Clipped):
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
        "context": {"answer": True},
        "teacher": {"type": "ema", "update_rate": 0.0},
    }

    def problems(self) -> Iterator[str]:
        if self.pointwise_clip is not None and self.support != "full":
            yield (
                f"pointwise_clip bounds the terms of single tokens, and support = {self.support!r} "
                "joins many; set support = 'full', or leave it out"
            )


class SkillSDConfig(_SometimesTaught, _Clipped):
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
