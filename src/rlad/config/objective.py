"""The knobs of each objective. Imports no torch."""

from typing import Annotated, Literal

from pydantic import Field

from rlad.config.types import (
    Annealed,
    AnnealedNonNegative,
    AnnealedShare,
    NonNegative,
    Positive,
    Section,
    Share,
)

DualClip = Annotated[float, Field(strict=True, gt=1)] | None


class _Clipped(Section):
    clip_low: NonNegative = 0.2
    """the ratio is clipped to [1 - clip_low, 1 + clip_high]"""
    clip_high: NonNegative = 0.28
    """see clip_low"""


class TRRDConfig(_Clipped):
    type: Literal["trrd"] = "trrd"
    alpha: Share | AnnealedShare = 0.5
    """1 is GRPO, 0 is anchored to the teacher alone"""
    teacher_log_ratio_clip: Positive | Literal["off"] = 1.0
    """c in clamp(log πS - log πT, -c, +c); `off` leaves the log-ratio unbounded"""
    ratio_level: Literal["token", "sequence"] = "token"
    """a ratio for each token, or one for the sequence (GSPO)"""
    dual_clip: DualClip = None
    """bound of the loss of negative advantages, above 1; none by default"""


class GRPOConfig(_Clipped):
    type: Literal["grpo"] = "grpo"
    ratio_level: Literal["token", "sequence"] = "token"
    """a ratio for each token, or one for the sequence (GSPO)"""
    dual_clip: DualClip = None
    """bound of the loss of negative advantages, above 1; none by default"""


class KDRLConfig(_Clipped):
    type: Literal["kdrl"] = "kdrl"
    kd_coef: NonNegative | AnnealedNonNegative = 2e-3
    """weight of the distillation term; KDRL's annealing is start 5e-3, end 1e-3, change_per_step
    -5e-5"""
    kd_estimator: Literal["k2", "k3"] = "k2"
    """of KL(πS || πT)"""
    masking: Literal["none", "response", "group"] = "none"
    """leave out the distillation of correct responses, or of groups with a correct response"""


class OPDConfig(Section):
    type: Literal["opd"] = "opd"


class OPDThenGRPOConfig(_Clipped):
    type: Literal["opd_then_grpo"] = "opd_then_grpo"
    opd_share: Share = 0.4
    """share of the run's steps with `opd`, rounded up to whole rollout batches; the rest is
    `grpo`"""


class RLSDConfig(_Clipped):
    type: Literal["rlsd"] = "rlsd"
    teacher_weight: Share | AnnealedShare = Annealed(start=0.5, end=0.0, change_per_step=-0.01)
    """λ: 0 is GRPO, 1 weighs every token by the teacher's evidence"""
    weight_clip: Share = 0.2
    """ε_w: the evidence weight is clipped to [1 - weight_clip, 1 + weight_clip]"""


class DistilledRLConfig(_Clipped):
    type: Literal["distilled_rl"] = "distilled_rl"
    weight_bound: Annotated[float, Field(strict=True, ge=1)] = 3.0
    """πT / πold is clipped to [1 / weight_bound, weight_bound]"""


class TOPDConfig(_Clipped):
    type: Literal["topd"] = "topd"
    alpha: Annotated[float, Field(strict=True, gt=0, lt=1)] = 0.1
    """share of the teacher in the mixture; no token reward lies below log(1 - alpha)"""


class SFTConfig(Section):
    """SFT, supervised fine-tuning on what the teacher writes (sequence-level distillation, arXiv
    1606.07947), by TRL.

    loss_t = -log πS of the teacher's token
    """

    type: Literal["sft"] = "sft"
    rejection: bool = True
    """train on those of the teacher's completions alone that the verifier calls correct"""


class GKDConfig(Section):
    """GKD, generalised knowledge distillation on the student's own completions (arXiv 2306.13649),
    by TRL.

    loss_t = generalised JSD_beta( πT || πS ) over the vocabulary
    """

    type: Literal["gkd"] = "gkd"
    beta: Share = 0.5
    """of the generalised Jensen-Shannon divergence: 0 is the forward KL, 1 the reverse KL"""


ObjectiveConfig = (
    TRRDConfig
    | GRPOConfig
    | KDRLConfig
    | OPDConfig
    | OPDThenGRPOConfig
    | RLSDConfig
    | DistilledRLConfig
    | TOPDConfig
    | SFTConfig
    | GKDConfig
)
