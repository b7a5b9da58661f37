"""The base of all objectives in the config, and the settings that several of them share."""

from collections.abc import Iterable
from typing import Any, ClassVar, Literal

from rlad.config.types import (
    NonNegative,
    Section,
    Support,
    at_step,
)

EngineName = Literal["native", "trl", "verl"]
TeacherOn = Literal["all", "positive", "wrong", "failed_groups"]

_NO_KNOBS = ("type", "teacher_on", "support", "top_k", "patch_pixels", "reasoning_template")
"""Settings that are not arguments of an objective's function."""


class ObjectiveSection(Section):
    """The base of all objectives. Its class variables are facts about an objective. Engines,
    checks, guards and reports read these facts and never compare an objective's name."""

    type: Any = None  # first, so that it comes first wherever settings are shown

    needs_teacher: ClassVar[bool] = True
    uses_reward: ClassVar[bool] = True
    zero_advantage_is_zero_gradient: ClassVar[bool] = False
    """Whether a completion with advantage 0 contributes exactly nothing to the gradient, so that
    scoring and update may leave it out."""
    written_by: ClassVar[Literal["student", "teacher"]] = "student"
    """The model that writes the completions to train on."""
    gates_by_teacher: ClassVar[bool] = False
    """Whether the teacher can turn off the gradient of single tokens."""
    engines: ClassVar[tuple[EngineName, ...]] = ("native", "trl", "verl")
    """The engines that support it; `trl` is `RLADTrainer`."""
    teacher_work: ClassVar[str] = "the teacher scores each sampled token once"
    default_teacher: ClassVar[dict[str, Any] | None] = None
    """The [teacher] section that is used when none is chosen together with the objective."""

    @property
    def weighs_roles(self) -> bool:
        """Whether the old policy also scores completions without the picture, and without their
        perception."""
        return False

    @property
    def asked_of_teacher(self) -> Support:
        """The tokens whose probabilities the scoring teacher is asked for."""
        return "sampled"

    @property
    def counted_rollouts(self) -> Literal["judged", "correct", "all"]:
        """The rollouts that the denominator of the loss counts. No other rollout is trained on."""
        return "judged" if self.uses_reward else "all"

    @property
    def schedule_depends_on_num_steps(self) -> bool:
        """Whether what a step does depends on the length of the run."""
        return False

    @property
    def is_of_old_policy(self) -> bool:
        """Whether its estimate is correct only for the policy that sampled: it has no πS / πold."""
        return False

    @property
    def asks_teacher_on(self) -> TeacherOn:
        """The completions that the teacher scores."""
        return "all"

    @property
    def num_deciding_validations(self) -> int | None:
        """The fewest validations after the first that can change the objective. None if validations
        do not change it."""
        return None

    def trains_without_teacher(self, step: int) -> bool:
        """Whether a completion without teacher log-probs is trained on at a step, by its reward."""
        return self.uses_reward

    def knobs_at(self, step: int) -> dict[str, Any]:
        """Return the keyword arguments of the objective's function at a step; "off" is None."""
        knobs = {key: at_step(value, step) for key, value in self if key not in _NO_KNOBS}
        return {key: None if value == "off" else value for key, value in knobs.items()}

    def flat_step(self, validations: Iterable[tuple[int, float]]) -> int | None:
        """Return the step after which the objective changes, given the validations (step, pass@1)
        so far. None if they have not decided it, or never do."""
        return None

    def at_step(
        self, step: int, num_steps: int, *, flat_step: int | None = None
    ) -> "ObjectiveSection":
        """Return the objective of one optimiser step (counted from 0) of a run of `num_steps`.
        `flat_step` is what the validations decided."""
        return self


class SometimesTaught(ObjectiveSection):
    teacher_on: TeacherOn = "all"
    """completions that the teacher scores: all, those with a positive advantage, those that are not
    correct, or those of groups without a correct one"""

    @property
    def asks_teacher_on(self) -> TeacherOn:
        return self.teacher_on


class Clipped(ObjectiveSection):
    clip_low: NonNegative = 0.2
    """the ratio is clipped to [1 - clip_low, 1 + clip_high]"""
    clip_high: NonNegative = 0.28
    """see clip_low"""
