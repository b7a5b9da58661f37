"""The guards against wrong numbers: a table of limits that is used by a run while it trains, by
`rlad doctor` afterwards and by the trial of `rlad check` before.

A guard reads one metric of the steps so far, as rows of metrics.jsonl. It warns once, at the first
step at which its figure is beyond its limit. Most figures are medians of several steps, so that a
single odd step has no effect.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any, Literal

from rlad.config.run import RunConfig

Row = Mapping[str, float]
"""The numbers in a row of metrics.jsonl."""


@dataclass(frozen=True, slots=True)
class Condition:
    """A figure computed from a metric's values so far, and the limit beyond which it is wrong."""

    metric: str
    says: str
    """how the figure is computed from the values"""
    figure: Callable[[Sequence[float]], float | None]
    """returns None while there are too few values"""
    side: Literal["above", "below"] = "above"
    limit: float = math.inf

    def above(self, limit: float) -> "Condition":
        return replace(self, side="above", limit=limit)

    def below(self, limit: float) -> "Condition":
        return replace(self, side="below", limit=limit)

    def beyond(self, values: Sequence[float]) -> float | None:
        """Return the figure if it is beyond the limit (not equal to it)."""
        figure = self.figure(values)
        if figure is None or figure == self.limit:
            return None
        return figure if (figure > self.limit) == (self.side == "above") else None


def recent(metric: str, window: int) -> Condition:
    """Take the median of the last `window` values."""
    return Condition(
        metric,
        "each step" if window == 1 else f"median of {window} steps",
        lambda values: median(values[-window:]) if len(values) >= window else None,
    )


def change(metric: str, window: int, floor: float) -> Condition:
    """Divide the median of the last `window` values by that of the first `window`, raised to at
    least `floor`."""

    def figure(values: Sequence[float]) -> float | None:
        if len(values) < 2 * window:
            return None
        return median(values[-window:]) / max(median(values[:window]), floor)

    says = f"median of {window} steps over that of the first {window} (at least {floor:g})"
    return Condition(metric, says, figure)


def jump(metric: str, window: int, before: int) -> Condition:
    """Divide the median of the last `window` values by that of the `before` values before them."""

    def figure(values: Sequence[float]) -> float | None:
        # If the earlier median is 0 (the metric had no effect yet), there is no ratio.
        former = values[-window - before : -window]
        if len(former) < before or not (usual := median(former)):
            return None
        return median(values[-window:]) / usual

    return Condition(metric, f"median of {window} steps over that of the {before} before", figure)


# --- metrics that are made of others --------------------------------------------------------------


def _dropped_share(row: Row) -> float | None:
    dropped = row.get("objective/dropped_tokens/count")
    trained = row.get("objective/trained_tokens/count")
    if dropped is None or trained is None or not dropped + trained:
        return None
    return dropped / (dropped + trained)


def _gated_share(row: Row) -> float | None:
    # The two gates are separate: a mean would hide one that closes fully behind one that is idle.
    keys = ("objective/gated_positive/frac", "objective/gated_negative/frac")
    return max((row[key] for key in keys if key in row), default=None)


def _distance_to_teacher(row: Row) -> float | None:
    return abs(row["teacher/log_ratio/q50"]) if "teacher/log_ratio/q50" in row else None


def _spoken_share(row: Row) -> float | None:
    # Recorded where it is not 1, in the first step on each rollout batch.
    return row.get("teacher/speaks/frac", 1.0 if "teacher/tokens/count" in row else None)


DROPPED = "dropped / (dropped + trained tokens)"
GATED = "the larger of objective/gated_positive/frac and objective/gated_negative/frac"
DISTANCE = "size of teacher/log_ratio/q50"
SPEAKS = "teacher/speaks/frac, 1 where absent"
_DERIVED = {
    DROPPED: _dropped_share,
    GATED: _gated_share,
    DISTANCE: _distance_to_teacher,
    SPEAKS: _spoken_share,
}


def numbers_of(row: Mapping[str, Any]) -> Row:
    """Return the numbers in a row of metrics.jsonl."""
    numbers = {key: float(value) for key, value in row.items() if isinstance(value, int | float)}
    return {key: value for key, value in numbers.items() if not math.isnan(value)}


def value_of(metric: str, row: Row) -> float | None:
    """Compute the metric of a step; None if it was not recorded."""
    return _DERIVED[metric](row) if metric in _DERIVED else row.get(metric)


# --- the table ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Guard:
    """A row of the table of guards. `meaning` and `advice` are parts of the warning's sentence."""

    name: str
    condition: Condition
    meaning: str
    advice: str
    concerns: Callable[[RunConfig], bool] = lambda config: True
    """whether the figure has a meaning in a run"""


# Each row has: a name; the figure, its metric, the limit and the side on which it is wrong; what
# that means; what to do; and the runs to which it applies.
GUARDS: tuple[Guard, ...] = (
    Guard(
        "skipped_steps",
        recent("optimization/skipped/count", 1).above(0.0),
        "loss or gradient was not finite, so the step was skipped and the weights stayed as they "
        "were",
        "look at its rollouts and scores in skipped-step-*; if it happens again, lower "
        "optimization.learning_rate or set objective.teacher_log_ratio_clip = 1.0",
    ),
    Guard(
        "sampler_mismatch",
        recent("sampler/mismatch/mean", 1).above(1e-3),
        "sampler and trainer give different log-probs to the same tokens of the same weights, by "
        "more than rounding to float32 can",
        "look for what they compute differently: temperature, prompt template, precision, a model "
        "with dropout",
        lambda config: config.student.dtype == "float32" and not config.rollout.max_staleness,
    ),
    Guard(
        "sampler_mismatch_bfloat16",
        recent("sampler/mismatch/mean", 1).above(0.05),
        "sampler and trainer give different log-probs to the same tokens of the same weights, by "
        "more than rounding to bfloat16 usually does",
        "look for what they compute differently: temperature, prompt template, a model with "
        "dropout; or set student.dtype = float32",
        lambda config: config.student.dtype != "float32" and not config.rollout.max_staleness,
    ),
    Guard(
        "teacher_coverage",
        recent(DROPPED, 3).above(0.01),
        "the teacher (or the reference) leaves tokens without a finite log-prob, and they train "
        "nothing",
        "check that it answers in full and does not overflow (bfloat16 instead of float16); "
        "optimization.max_missing_teacher_share says when the run stops",
    ),
    Guard(
        "teacher_far_away",
        # Of half the tokens: the few on which a good teacher disagrees strongly do not count.
        # Models of one family differ by some hundredths or tenths of a nat there; unrelated
        # vocabularies or prompt formats give several nats.
        recent(DISTANCE, 5).above(1.0),
        "the teacher finds half of the student's own tokens very unlikely",
        "compare vocabulary, prompt format and temperature of the two; `rlad check` shows samples' "
        "figures",
    ),
    Guard(
        "silent_teacher",
        recent(SPEAKS, 5).below(0.01),
        "the teacher is silent on next to all completions, as there is nothing to show it or "
        "objective.teacher_on rules them out, and teaches nothing",
        "take easier problems or a larger rollout.group_size, show it more (answer or feedback in "
        "teacher.context), or set objective.teacher_on = all",
    ),
    Guard(
        "nearly_all_gated",
        # Gates are meant for the tokens on which teacher and reward disagree, the minority for a
        # teacher that knows the task.
        recent(GATED, 5).above(0.5),
        "most tokens of one sign of advantage get no gradient",
        "raise objective.alpha or the clips or take another teacher; without a teacher in the "
        "ratio, take fewer "
        "optimization.steps_per_rollout_batch or a lower optimization.learning_rate",
    ),
    Guard(
        "nearly_none_gated",
        recent(GATED, 20).below(1e-4),
        "the teacher holds back and protects next to no token, so TRRD acts like GRPO",
        "lower objective.alpha, raise objective.teacher_log_ratio_clip, or take a teacher that "
        "differs from the student",
        # An `ema` teacher begins as the student itself: no gates are what is to be expected.
        lambda config: (
            config.objective.gates_by_teacher
            and config.teacher is not None
            and config.teacher.type != "ema"
        ),
    ),
    Guard(
        "entropy_collapse",
        change("student/entropy/mean", 5, 0.01).below(0.2),
        "the student has become nearly certain of every token: its rollouts of a prompt will be "
        "alike and teach nothing",
        "lower optimization.learning_rate, raise objective.clip_high, or set optimization.kl_coef",
    ),
    Guard(
        "entropy_explosion",
        change("student/entropy/mean", 5, 0.1).above(4.0),
        "the student's tokens become random",
        "lower optimization.learning_rate or set optimization.kl_coef; an earlier checkpoint is "
        "the better student",
    ),
    Guard(
        "length_collapse",
        change("rollout/completion_tokens/mean", 5, 1.0).below(0.2),
        "completions have become much shorter than at the start: the student may answer without "
        "reasoning",
        "read samples.jsonl; if so, look for a reward without reasoning in the verifier, or set "
        "optimization.kl_coef",
    ),
    Guard(
        "length_explosion",
        change("rollout/completion_tokens/mean", 5, 1.0).above(10.0),
        "completions have become much longer than at the start: the student may repeat itself",
        "read samples.jsonl; if so, lower optimization.learning_rate or "
        "rollout.max_completion_tokens",
    ),
    Guard(
        "truncated",
        recent("rollout/truncated/frac", 5).above(0.5),
        "most completions are cut off before their end, and what is cut off is mostly graded wrong",
        "raise rollout.max_completion_tokens, or look in samples.jsonl for completions that never "
        "end",
    ),
    Guard(
        "zero_variance",
        recent("reward/zero_variance/frac", 10).above(0.9),
        "in nearly all groups every rollout has the same reward, so nothing is learned from them",
        "take easier problems if reward/mean is near 0 and harder ones if it is near 1, or raise "
        "rollout.group_size",
        lambda config: config.objective.uses_reward,
    ),
    Guard(
        "cannot_judge",
        recent("reward/cannot_judge/frac", 5).above(0.2),
        "the verifier cannot judge many completions, and they train nothing",
        "read samples.jsonl for what it is given; raise its time limit, or fix the verifier or "
        "the reference answers",
    ),
    Guard(
        "nothing_accepted",
        recent("objective/scored_completions/frac", 3).below(0.01),
        "the verifier calls next to none of the teacher's completions correct, so there is nothing "
        "to train on",
        "use a better teacher or easier problems, or set objective.rejection = false",
        lambda config: config.objective.counted_rollouts == "correct",
    ),
    Guard(
        "identical_completions",
        recent("rollout/repeated/frac", 5).above(0.8),
        "most rollouts of a group are the same text, so there is nothing to compare",
        "raise rollout.temperature, or take problems whose answers need more than a few tokens",
    ),
    Guard(
        "ratio_explosion",
        recent("objective/ratio/max", 5).above(100.0),
        "some tokens weigh a hundred times what they should, where the clip does not hold "
        "(negative advantages)",
        "set objective.teacher_log_ratio_clip = 1.0 or objective.dual_clip, or take fewer "
        "optimization.steps_per_rollout_batch",
    ),
    Guard(
        "kl_explosion",
        recent("reference/kl/mean", 5).above(1.0),
        "the student is a nat per token away from where it began, in spite of the KL leash",
        "raise optimization.kl_coef or lower optimization.learning_rate",
    ),
    Guard(
        "gradient_spikes",
        jump("optimization/gradient_norm", 3, 20).above(10.0),
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
        return asdict(self) | {"value": json_number(self.value)}


def json_number(value: float | None) -> float | str | None:
    """Return a number for JSON, with infinity as a word."""
    return value if value is None or math.isfinite(value) else str(value)


class Watch:
    """The state of all guards, which reads the rows of metrics.jsonl one after the other. It
    depends only on these rows, so it is the same in a resumed run."""

    def __init__(self, config: RunConfig):
        self.guards = {guard.name: guard for guard in GUARDS if guard.concerns(config)}
        self._values: dict[str, list[float]] = {
            guard.condition.metric: [] for guard in self.guards.values()
        }
        self._said: set[str] = set()
        self.skipped_in_a_row = 0

    def see(self, row: Mapping[str, Any]) -> list[GuardWarning]:
        """Return the warnings after this step. Each guard warns once."""
        # From here on NaN counts as "not recorded": it would spoil medians and compare as false.
        row = numbers_of(row)
        is_skipped = bool(row.get("optimization/skipped/count"))
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if is_skipped else 0
        # A step without a metric is not part of the metric's window, and does not trigger its
        # guards: an old figure must not warn at a later step.
        now = {metric: value_of(metric, row) for metric in self._values}
        recorded = {metric: value for metric, value in now.items() if value is not None}
        for metric, value in recorded.items():
            self._values[metric].append(value)
        found = []
        for name, guard in self.guards.items():
            condition = guard.condition
            if name in self._said or condition.metric not in recorded:
                continue
            figure = condition.beyond(self._values[condition.metric])
            if figure is not None:
                self._said.add(name)
                measured = f"{condition.metric}, {condition.says}: {figure:.3g}"
                message = (
                    f"{guard.meaning} ({measured}, limit {condition.limit:g}); {guard.advice}."
                )
                found.append(GuardWarning(int(row["step"]), name, figure, condition.limit, message))
        return found

    def still_speaks(self, name: str) -> bool:
        """Return whether a guard's figure is beyond its limit at the last step."""
        condition = self.guards[name].condition
        return condition.beyond(self._values[condition.metric]) is not None
