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
    default_teacher: ClassVar[dict[str, Any] | None] = None
    """The [teacher] section that the choice of it brings along, where none is given beside it."""

    @property
    def weighs_roles(self) -> bool:
        """Whether the old policy scores completions without the picture, and without what they
        see."""
        return False

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

    @property
    def num_deciding_validations(self) -> int | None:
        """The fewest validations after the first that can change it; None where none does."""
        return None

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


class SometimesTaught(ObjectiveSection):
    teacher_on: TeacherOn = "all"
    """completions on which the teacher has a say: all, those of positive advantage, those that are
    not correct, or those of groups without a correct one"""

    @property
    def asks_teacher_on(self) -> TeacherOn:
        return self.teacher_on


class Clipped(ObjectiveSection):
    clip_low: NonNegative = 0.2
    """the ratio is clipped to [1 - clip_low, 1 + clip_high]"""
    clip_high: NonNegative = 0.28
    """see clip_low"""
