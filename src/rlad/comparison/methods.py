"""The figures of the methods of one table: means with intervals over seeds and problems, and the
comparison with the baseline."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev

from rlad.comparison.comparable import Group, Method
from rlad.comparison.runs import PARTS, MissingRun, Run
from rlad.errors import UserError
from rlad.runs.results import ProblemResult, ks_up_to
from rlad.runs.statistics import (
    Comparison,
    Estimate,
    compare,
    holm,
    mean_over_seeds,
    paired_difference,
    pass_at_k,
)

Pick = Callable[[Run], Sequence[ProblemResult]]
BASELINE = "grpo"


@dataclass(frozen=True)
class MethodFigures:
    """The figures of a method, on the test split and after training unless they say otherwise."""

    method: Method
    before: Estimate
    after: Estimate
    sd: float
    """standard deviation of pass@1 over seeds; NaN with one seed"""
    gain: Estimate
    """pass@1 after - before"""
    pass_at_k: dict[int, Estimate]
    by_difficulty: dict[str, Estimate]
    ood: Estimate | None
    completion_tokens: float
    truncated_share: float
    cost: "Cost"
    to_baseline: Comparison | None = None
    corrected_p: float = math.nan

    @property
    def name(self) -> str:
        return self.method.name

    @property
    def p_value(self) -> float:
        return self.to_baseline.p_value if self.to_baseline else math.nan


@dataclass(frozen=True)
class Cost:
    """The costs of a method, means over its runs; NaN where a run has not recorded it."""

    num_steps: float
    seconds: dict[str, float]
    """of training, by part"""
    completion_tokens: float
    teacher_tokens: float
    peak_memory: float
    """the largest of any run, bytes"""

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def seconds_per_step(self) -> float:
        return self.total_seconds / self.num_steps if self.num_steps else math.nan

    def share(self, part: str) -> float:
        return self.seconds[part] / self.total_seconds if self.total_seconds else math.nan


def baseline_of(group: Group, chosen: str | None = None) -> Method:
    """Choose the method named `chosen`, else the one named `grpo`, else the first without a
    teacher, else the first."""
    methods = group.methods
    without_teacher = [m for m in methods if not m.config.needs_teacher]
    named_grpo = [m for m in methods if m.name == BASELINE]
    return _named(methods, chosen) or [*named_grpo, *without_teacher, *methods][0]


def require_baseline(chosen: str, groups: Sequence[Group], missing: Sequence[MissingRun]) -> None:
    """Raise `UserError` when no table has a method of this name, though there are tables and none
    of its runs is missing."""
    methods = [method for group in groups for method in group.methods]
    if methods and not _named(methods, chosen) and chosen not in {run.method for run in missing}:
        names = ", ".join(dict.fromkeys(method.name for method in methods))
        raise UserError(f"the baseline {chosen!r} is none of the methods; there are {names}.")


def _named(methods: Sequence[Method], name: str | None) -> Method | None:
    """Find the method of this name, or the first of those that had it before what tells them apart
    was added."""
    exact = [m for m in methods if m.name == name]
    short = [m for m in methods if m.runs[0].method == name]
    return next(iter(exact + short), None)


def figures_of(group: Group, chosen: str | None = None) -> list[MethodFigures]:
    """Compute the figures of each method; all but the baseline with its difference to it, p-values
    corrected for their number."""
    baseline = baseline_of(group, chosen)
    # p-values can be corrected only once all are known.
    figures = [_figures(method) for method in group.methods]
    compared = [
        f if f.method is baseline else replace(f, to_baseline=_compare(f.method, baseline))
        for f in figures
    ]
    # Corrected in the order of the methods, the baseline left out.
    corrected = iter(holm([f.to_baseline.p_value for f in compared if f.to_baseline]))
    return [replace(f, corrected_p=next(corrected)) if f.to_baseline else f for f in compared]


def _compare(method: Method, baseline: Method) -> Comparison:
    values = [{run.seed: _pass(run.after, 1) for run in each.runs} for each in (method, baseline)]
    return compare(values[0], values[1], _keys(baseline.runs[0].after), limits=(-1, 1))


def _figures(method: Method) -> MethodFigures:
    runs = method.runs
    first = runs[0]
    num_samples = first.after[0].num_samples

    def of_difficulty(name: str) -> Estimate:
        return _estimate(runs, lambda run: [r for r in run.after if r.difficulty == name])

    difficulties = sorted({r.difficulty for r in first.after} - {""})
    after = [_pass(run.after, 1) for run in runs]
    return MethodFigures(
        method=method,
        before=_estimate(runs, lambda run: run.before),
        after=_estimate(runs, lambda run: run.after),
        sd=stdev(map(fmean, after)) if len(runs) > 1 else math.nan,
        gain=paired_difference(
            after, [_pass(run.before, 1) for run in runs], _keys(first.after), limits=(-1, 1)
        ),
        pass_at_k={k: _estimate(runs, lambda run: run.after, k) for k in ks_up_to(num_samples)},
        by_difficulty={name: of_difficulty(name) for name in difficulties},
        ood=_estimate(runs, lambda run: run.ood_after) if first.ood_after else None,
        completion_tokens=fmean(r.mean_completion_tokens for run in runs for r in run.after),
        truncated_share=fmean(r.num_truncated / r.num_samples for run in runs for r in run.after),
        cost=_cost(runs),
    )


def _estimate(runs: Sequence[Run], pick: Pick, k: int = 1) -> Estimate:
    return mean_over_seeds(
        [_pass(pick(run), k) for run in runs], _keys(pick(runs[0])), limits=(0, 1)
    )


def _pass(results: Sequence[ProblemResult], k: int) -> list[float]:
    return [pass_at_k(r.num_samples, r.num_correct, k) for r in results]


def _keys(results: Sequence[ProblemResult]) -> list[str]:
    return [result.key for result in results]


def _cost(runs: Sequence[Run]) -> Cost:
    known = [run.peak_memory for run in runs if not math.isnan(run.peak_memory)]
    return Cost(
        num_steps=fmean(run.num_steps for run in runs),
        seconds={part: fmean(run.seconds[part] for run in runs) for part in PARTS},
        completion_tokens=fmean(run.completion_tokens for run in runs),
        teacher_tokens=fmean(run.teacher_tokens for run in runs),
        peak_memory=max(known, default=math.nan),
    )
