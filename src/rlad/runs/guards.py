"""The guards against wrong numbers: a table of limits. It is used by the trial of `rlad check`
before a run, by the run while it trains, and by `rlad doctor` afterwards.

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


# --- derived metrics ------------------------------------------------------------------------------


def _dropped_share(row: Row) -> float | None:
    dropped = row.get("objective/dropped_tokens/count")
    trained = row.get("objective/trained_tokens/count")
    if dropped is None or trained is None or not dropped + trained:
        return None
    return dropped / (dropped + trained)


def _gated_share(row: Row) -> float | None:
    # The two gates are separate: in a mean, an inactive gate would hide one that closes fully.
    keys = ("objective/gated_positive/frac", "objective/gated_negative/frac")
    return max((row[key] for key in keys if key in row), default=None)


def _distance_to_teacher(row: Row) -> float | None:
    return abs(row["teacher/log_ratio/q50"]) if "teacher/log_ratio/q50" in row else None


def _spoken_share(row: Row) -> float | None:
    # It is recorded in the first step on each rollout batch, if it is not 1.
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
        "the log-probs of sampler and trainer for the same tokens and weights differ by more than "
        "float32 rounding",
        "find out what they compute differently: temperature, prompt template, precision, a model "
        "with dropout",
        lambda config: config.student.dtype == "float32" and not config.rollout.max_staleness,
    ),
    Guard(
        "sampler_mismatch_bfloat16",
        recent("sampler/mismatch/mean", 1).above(0.05),
        "the log-probs of sampler and trainer for the same tokens and weights differ by more than "
        "bfloat16 rounding usually explains",
        "find out what they compute differently: temperature, prompt template, a model with "
        "dropout; or set student.dtype = float32",
        lambda config: config.student.dtype != "float32" and not config.rollout.max_staleness,
    ),
    Guard(
        "teacher_coverage",
        recent(DROPPED, 3).above(0.01),
        "tokens without a finite log-prob of the teacher (or the reference) are left out of the "
        "training",
        "check that its answers are complete and that it does not overflow (use bfloat16 instead "
        "of float16); optimization.max_missing_teacher_share sets when the run stops",
    ),
    Guard(
        "teacher_far_away",
        # The median ignores the few tokens on which a good teacher disagrees strongly. Models of
        # one family differ by hundredths or tenths of a nat; unrelated vocabularies or prompt
        # formats differ by several nats.
        recent(DISTANCE, 5).above(1.0),
        "the teacher finds half of the student's own tokens very unlikely",
        "compare vocabulary, prompt format and temperature of the two; `rlad check` shows the "
        "log-ratios of samples",
    ),
    Guard(
        "silent_teacher",
        recent(SPEAKS, 5).below(0.01),
        "the teacher scores almost no completions, because it has nothing to be shown or "
        "objective.teacher_on excludes them, so it has no effect",
        "use easier problems or a larger rollout.group_size, show it more (answer or feedback in "
        "teacher.context), or set objective.teacher_on = all",
    ),
    Guard(
        "nearly_all_gated",
        # Gates are for tokens on which teacher and reward disagree. With a teacher that knows the
        # task these are a minority.
        recent(GATED, 5).above(0.5),
        "most tokens with one sign of the advantage get no gradient",
        "raise objective.alpha or the clips, or use another teacher; if the ratio has no teacher, "
        "set fewer "
        "optimization.steps_per_rollout_batch or a lower optimization.learning_rate",
    ),
    Guard(
        "nearly_none_gated",
        recent(GATED, 20).below(1e-4),
        "the teacher holds back or protects almost no tokens, so TRRD acts like GRPO",
        "lower objective.alpha, raise objective.teacher_log_ratio_clip, or use a teacher that "
        "differs more from the student",
        # An `ema` teacher starts as the student itself, so gates are not expected.
        lambda config: (
            config.objective.gates_by_teacher
            and config.teacher is not None
            and config.teacher.type != "ema"
        ),
    ),
    Guard(
        "entropy_collapse",
        change("student/entropy/mean", 5, 0.01).below(0.2),
        "the student has become nearly certain of every token: the rollouts of a prompt will be "
        "the same, so nothing is learned from them",
        "lower optimization.learning_rate, raise objective.clip_high, or set optimization.kl_coef",
    ),
    Guard(
        "entropy_explosion",
        change("student/entropy/mean", 5, 0.1).above(4.0),
        "the student's tokens are becoming random",
        "lower optimization.learning_rate or set optimization.kl_coef; use an earlier checkpoint",
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
        "most completions are truncated, and truncated completions are mostly graded wrong",
        "raise rollout.max_completion_tokens, or look in samples.jsonl for completions that never "
        "end",
    ),
    Guard(
        "zero_variance",
        recent("reward/zero_variance/frac", 10).above(0.9),
        "in nearly all groups every rollout has the same reward, so nothing is learned from them",
        "use easier problems if reward/mean is near 0 and harder ones if it is near 1, or raise "
        "rollout.group_size",
        lambda config: config.objective.uses_reward,
    ),
    Guard(
        "cannot_judge",
        recent("reward/cannot_judge/frac", 5).above(0.2),
        "the verifier cannot judge many completions, and these are left out of the training",
        "read its inputs in samples.jsonl; raise its time limit, or fix the verifier or the "
        "reference answers",
    ),
    Guard(
        "nothing_accepted",
        recent("objective/scored_completions/frac", 3).below(0.01),
        "the verifier finds almost none of the teacher's completions correct, so there is nothing "
        "to train on",
        "use a better teacher or easier problems, or set objective.rejection = false",
        lambda config: config.objective.counted_rollouts == "correct",
    ),
    Guard(
        "identical_completions",
        recent("rollout/repeated/frac", 5).above(0.8),
        "most rollouts of a group are the same text, so there is nothing to compare",
        "raise rollout.temperature, or use problems whose answers need more than a few tokens",
    ),
    Guard(
        "ratio_explosion",
        recent("objective/ratio/max", 5).above(100.0),
        "some tokens have a weight of more than a hundred, where the clip does not apply "
        "(negative advantages)",
        "set objective.teacher_log_ratio_clip = 1.0 or objective.dual_clip, or set fewer "
        "optimization.steps_per_rollout_batch",
    ),
    Guard(
        "kl_explosion",
        recent("reference/kl/mean", 5).above(1.0),
        "the student is more than a nat per token away from the reference, despite the KL leash",
        "raise optimization.kl_coef or lower optimization.learning_rate",
    ),
    Guard(
        "gradient_spikes",
        jump("optimization/gradient_norm", 3, 20).above(10.0),
        "the gradient norm is many times that of the previous twenty steps",
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
    """The state of all guards, updated with each row of metrics.jsonl. It depends only on these
    rows, so it is the same in a resumed run."""

    def __init__(self, config: RunConfig):
        self.guards = {guard.name: guard for guard in GUARDS if guard.concerns(config)}
        self._values: dict[str, list[float]] = {
            guard.condition.metric: [] for guard in self.guards.values()
        }
        self._said: set[str] = set()
        self.skipped_in_a_row = 0

    def see(self, row: Mapping[str, Any]) -> list[GuardWarning]:
        """Return the warnings after this step. Each guard warns once."""
        # NaN counts as "not recorded", since it would spoil medians and compare as false.
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
