"""The guards against wrong numbers: one table of limits, read by a run while it trains and by
`rlad doctor` later.

A guard looks at one metric of the steps so far, as rows of metrics.jsonl, and speaks once: at the
first step at which its figure is beyond its limit. Most figures are medians of several steps, so
that one odd step says nothing.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rlad.config.run import RunConfig
from rlad.runs.trends import Figure, change, jump, numbers_of, recent, value_of

# Of half the tokens, so that the few on which a good teacher disagrees strongly do not count.
# Student and teacher of one family differ by some hundredths or tenths of a nat there; unrelated
# vocabularies or prompt formats give several nats.
LARGE_LOG_RATIO = 1.0
# Gates are meant for the tokens on which teacher and reward disagree, the minority for a teacher
# that knows the task.
LARGE_GATED_SHARE = 0.5


@dataclass(frozen=True, slots=True)
class Guard:
    """A row of the table. `meaning` and `advice` are parts of the warning's sentence."""

    name: str
    metric: str
    figure: Figure
    side: Literal["above", "below"]
    limit: float
    meaning: str
    advice: str
    concerns: Callable[[RunConfig], bool] = lambda config: True
    """whether the figure means something in such a run"""

    def speaks(self, values: Sequence[float]) -> float | None:
        """Return the figure if it is beyond the limit."""
        figure = self.figure.of(values)
        if figure is None:
            return None
        is_beyond = figure > self.limit if self.side == "above" else figure < self.limit
        return figure if is_beyond else None


def _gates_by_teacher(config: RunConfig) -> bool:
    # A moving average of the student begins as the student itself: then no gates are what is to be
    # expected.
    return (
        config.objective.gates_by_teacher
        and config.teacher is not None
        and config.teacher.type != "ema"
    )


# Read a row as: name, metric, how its values become one figure, which side of which limit is
# wrong; then what that means, what to do, and in which runs it applies.
GUARDS: tuple[Guard, ...] = (
    Guard(
        "skipped_steps",
        "optimization/skipped/count",
        recent(1),
        "above",
        0.0,
        "loss or gradient was not finite, so the step was skipped and the weights stayed as they "
        "were",
        "look at its rollouts and scores in skipped-step-*; if it happens again, lower "
        "optimization.learning_rate or set objective.teacher_log_ratio_clip = 1.0",
    ),
    Guard(
        "sampler_mismatch",
        "sampler/mismatch/mean",
        recent(1),
        "above",
        1e-3,
        "sampler and trainer give different log-probs to the same tokens of the same weights, by "
        "more than rounding to float32 can",
        "look for what they compute differently: temperature, prompt template, precision, a model "
        "with dropout",
        lambda config: config.student.dtype == "float32",
    ),
    Guard(
        "sampler_mismatch_bfloat16",
        "sampler/mismatch/mean",
        recent(1),
        "above",
        0.05,
        "sampler and trainer give different log-probs to the same tokens of the same weights, by "
        "more than rounding to bfloat16 usually does",
        "look for what they compute differently: temperature, prompt template, a model with "
        "dropout; or set student.dtype = float32",
        lambda config: config.student.dtype != "float32",
    ),
    Guard(
        "teacher_coverage",
        "dropped / (dropped + trained tokens)",
        recent(3),
        "above",
        0.01,
        "the teacher (or the reference) leaves tokens without a finite log-prob, and they train "
        "nothing",
        "check that it answers in full and does not overflow (bfloat16 instead of float16); "
        "optimization.max_missing_teacher_share says when the run stops",
    ),
    Guard(
        "teacher_far_away",
        "size of teacher/log_ratio/q50",
        recent(5),
        "above",
        LARGE_LOG_RATIO,
        "the teacher finds half of the student's own tokens very unlikely",
        "compare vocabulary, prompt format and temperature of the two; `rlad check` shows samples' "
        "figures",
    ),
    Guard(
        "nearly_all_gated",
        "the larger of objective/gated_positive/frac and objective/gated_negative/frac",
        recent(5),
        "above",
        LARGE_GATED_SHARE,
        "most tokens of one sign of advantage get no gradient",
        "raise objective.alpha or the clips or take another teacher; without a teacher in the "
        "ratio, take fewer "
        "optimization.steps_per_rollout_batch or a lower optimization.learning_rate",
    ),
    Guard(
        "nearly_none_gated",
        "the larger of objective/gated_positive/frac and objective/gated_negative/frac",
        recent(20),
        "below",
        1e-4,
        "the teacher holds back and protects next to no token, so TRRD acts like GRPO",
        "lower objective.alpha, raise objective.teacher_log_ratio_clip, or take a teacher that "
        "differs from the student",
        _gates_by_teacher,
    ),
    Guard(
        "entropy_collapse",
        "student/entropy/mean",
        change(5, 0.01),
        "below",
        0.2,
        "the student has become nearly certain of every token: its rollouts of a prompt will be "
        "alike and teach nothing",
        "lower optimization.learning_rate, raise objective.clip_high, or set optimization.kl_coef",
    ),
    Guard(
        "entropy_explosion",
        "student/entropy/mean",
        change(5, 0.1),
        "above",
        4.0,
        "the student's tokens become random",
        "lower optimization.learning_rate or set optimization.kl_coef; an earlier checkpoint is "
        "the better student",
    ),
    Guard(
        "length_collapse",
        "rollout/completion_tokens/mean",
        change(5, 1.0),
        "below",
        0.2,
        "completions have become much shorter than at the start: the student may answer without "
        "reasoning",
        "read samples.jsonl; if so, look for a reward without reasoning in the verifier, or set "
        "optimization.kl_coef",
    ),
    Guard(
        "length_explosion",
        "rollout/completion_tokens/mean",
        change(5, 1.0),
        "above",
        10.0,
        "completions have become much longer than at the start: the student may repeat itself",
        "read samples.jsonl; if so, lower optimization.learning_rate or "
        "rollout.max_completion_tokens",
    ),
    Guard(
        "truncated",
        "rollout/truncated/frac",
        recent(5),
        "above",
        0.5,
        "most completions are cut off before their end, and what is cut off is mostly graded wrong",
        "raise rollout.max_completion_tokens, or look in samples.jsonl for completions that never "
        "end",
    ),
    Guard(
        "zero_variance",
        "reward/zero_variance/frac",
        recent(10),
        "above",
        0.9,
        "in nearly all groups every rollout has the same reward, so nothing is learned from them",
        "take easier problems if reward/mean is near 0 and harder ones if it is near 1, or raise "
        "rollout.group_size",
        lambda config: config.objective.uses_reward,
    ),
    Guard(
        "cannot_judge",
        "reward/cannot_judge/frac",
        recent(5),
        "above",
        0.2,
        "the verifier cannot judge many completions, and they train nothing",
        "read samples.jsonl for what it is given; raise its time limit, or fix the verifier or "
        "the reference answers",
    ),
    Guard(
        "nothing_accepted",
        "objective/scored_completions/frac",
        recent(3),
        "below",
        0.01,
        "the verifier calls next to none of the teacher's completions correct, so there is nothing "
        "to train on",
        "use a better teacher or easier problems, or set objective.rejection = false",
        lambda config: config.objective.counted_rollouts == "correct",
    ),
    Guard(
        "identical_completions",
        "rollout/repeated/frac",
        recent(5),
        "above",
        0.8,
        "most rollouts of a group are the same text, so there is nothing to compare",
        "raise rollout.temperature, or take problems whose answers need more than a few tokens",
    ),
    Guard(
        "ratio_explosion",
        "objective/ratio/max",
        recent(5),
        "above",
        100.0,
        "some tokens weigh a hundred times what they should, where the clip does not hold "
        "(negative advantages)",
        "set objective.teacher_log_ratio_clip = 1.0 or objective.dual_clip, or take fewer "
        "optimization.steps_per_rollout_batch",
    ),
    Guard(
        "kl_explosion",
        "reference/kl/mean",
        recent(5),
        "above",
        1.0,
        "the student is a nat per token away from where it began, in spite of the KL leash",
        "raise optimization.kl_coef or lower optimization.learning_rate",
    ),
    Guard(
        "gradient_spikes",
        "optimization/gradient_norm",
        jump(3, 20),
        "above",
        10.0,
        "the gradient is many times as long as it was for twenty steps",
        "lower optimization.learning_rate or optimization.max_grad_norm; read samples.jsonl of "
        "these steps",
    ),
)


# --- watching -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class GuardWarning:
    """The warning of a guard: a row of warnings.jsonl."""

    step: int
    name: str
    value: float
    limit: float
    message: str

    def to_json(self) -> dict[str, Any]:
        value = self.value if math.isfinite(self.value) else str(self.value)
        return asdict(self) | {"value": value}


class Watch:
    """The state of all guards, which sees the rows of metrics.jsonl one after the other; a function
    of them alone, so that it works the same in a resumed run."""

    def __init__(self, config: RunConfig):
        self.guards = [guard for guard in GUARDS if guard.concerns(config)]
        self._values: dict[str, list[float]] = {guard.metric: [] for guard in self.guards}
        self._said: set[str] = set()
        self.skipped_in_a_row = 0

    def see(self, row: Mapping[str, Any]) -> list[GuardWarning]:
        """Return the warnings after this step: each guard speaks once."""
        # NaN is "not recorded" from here on; it would poison medians and compare as false.
        row = numbers_of(row)
        is_skipped = bool(row.get("optimization/skipped/count"))
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if is_skipped else 0
        # A step that has not recorded a metric is no step of its window.
        for metric, values in self._values.items():
            if (value := value_of(metric, row)) is not None:
                values.append(value)
        found = []
        for guard in self.guards:
            # Silent where this step has no new value: an old figure must not speak at a later step.
            if guard.name in self._said or value_of(guard.metric, row) is None:
                continue
            if (figure := guard.speaks(self._values[guard.metric])) is not None:
                self._said.add(guard.name)
                measured = (
                    f"{guard.metric}, {guard.figure.says}: {figure:.3g}, limit {guard.limit:g}"
                )
                message = f"{guard.meaning} ({measured}); {guard.advice}."
                step = int(row["step"])
                found.append(GuardWarning(step, guard.name, figure, guard.limit, message))
        return found

    def still_speaks(self, name: str) -> bool:
        """Say whether a guard's figure is beyond its limit at the last step that was seen."""
        guard = next(each for each in self.guards if each.name == name)
        return guard.speaks(self._values[guard.metric]) is not None
