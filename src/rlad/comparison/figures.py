"""The figures of a method in a report: means with intervals over seeds and problems, costs, and the
comparison with the baseline."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import fmean, stdev
from typing import Any

from rlad.comparison.finished_runs import PARTS, MissingRun, Results, Run
from rlad.config.run import RunConfig
from rlad.errors import UserError
from rlad.runs.rows import summarise
from rlad.runs.statistics import Comparison, Estimate, compare, holm, paired_difference

BASELINE = "grpo"


@dataclass(frozen=True)
class Method:
    """The runs of one method, one for each seed. Figures are from the test after training. Costs
    are means over the runs, NaN if a run has not recorded them."""

    name: str
    runs: Sequence[Run]
    to_baseline: Comparison | None = None
    """None for the baseline itself"""
    corrected_p: float = math.nan

    @property
    def seeds(self) -> list[int]:
        return [run.seed for run in self.runs]

    @property
    def config(self) -> RunConfig:
        return self.runs[0].config

    @cached_property
    def summary(self) -> dict[str, Any]:
        return summarise([run.after for run in self.runs])

    @property
    def pass_at_k(self) -> dict[int, Estimate]:
        return self.summary["pass@k"]

    @property
    def after(self) -> Estimate:
        return self.pass_at_k[1]

    @cached_property
    def before(self) -> Estimate:
        return summarise([run.before for run in self.runs])["pass@k"][1]

    @property
    def by_difficulty(self) -> dict[str, Estimate]:
        return self.summary["pass@1 by difficulty"]

    @cached_property
    def ood(self) -> Estimate | None:
        tests = [run.ood_after for run in self.runs]
        return summarise(tests)["pass@k"][1] if tests[0] else None

    @property
    def pass_by_seed(self) -> dict[int, list[float]]:
        """Seed -> pass@1 of each test problem."""
        return {run.seed: _pass(run.after) for run in self.runs}

    @cached_property
    def gain(self) -> Estimate:
        """pass@1 after - before"""
        after = list(self.pass_by_seed.values())
        before = [_pass(run.before) for run in self.runs]
        return paired_difference(after, before, self.keys, limits=(-1, 1))

    @property
    def sd(self) -> float:
        """Standard deviation of pass@1 over seeds; NaN with one seed."""
        means = [fmean(values) for values in self.pass_by_seed.values()]
        return stdev(means) if len(means) > 1 else math.nan

    @property
    def keys(self) -> list[str]:
        return [result.key for result in self.runs[0].after]

    @property
    def p_value(self) -> float:
        return self.to_baseline.p_value if self.to_baseline else math.nan

    @property
    def completion_tokens(self) -> float:
        """Mean completion length in the test."""
        return self.summary["mean_completion_tokens"]

    @property
    def num_turns(self) -> float:
        """Mean number of turns of an episode in the test; NaN for a single-turn task."""
        return self.summary.get("mean_turns", math.nan)

    @property
    def truncated_share(self) -> float:
        return self.summary["truncated_share"]

    @property
    def num_steps(self) -> float:
        return fmean(run.num_steps for run in self.runs)

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of training by part."""
        return {part: fmean(run.seconds[part] for run in self.runs) for part in PARTS}

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def seconds_per_step(self) -> float:
        return self.total_seconds / self.num_steps if self.num_steps else math.nan

    def share_of_time(self, part: str) -> float:
        return self.seconds[part] / self.total_seconds if self.total_seconds else math.nan

    @property
    def gated_positive(self) -> float:
        return fmean(run.gated_positive for run in self.runs)

    @property
    def gated_negative(self) -> float:
        return fmean(run.gated_negative for run in self.runs)

    @property
    def peak_memory(self) -> float:
        """The largest peak of any run, in bytes."""
        known = [run.peak_memory for run in self.runs if not math.isnan(run.peak_memory)]
        return max(known, default=math.nan)


def _pass(results: Results) -> list[float]:
    return [r.num_correct / r.num_samples for r in results]


def baseline_of(methods: Sequence[Method], chosen: str | None = None) -> Method:
    """Choose the method named `chosen`; otherwise `grpo`, the first method without a teacher, or
    the first method, in this order."""
    without_teacher = [m for m in methods if not m.config.needs_teacher]
    named_grpo = [m for m in methods if m.name == BASELINE]
    return _named(methods, chosen) or [*named_grpo, *without_teacher, *methods][0]


def require_baseline(chosen: str, methods: Sequence[Method], missing: Sequence[MissingRun]) -> None:
    """Raise `UserError` if no method, and no missing run, has this name."""
    if methods and not _named(methods, chosen) and chosen not in {run.method for run in missing}:
        names = ", ".join(dict.fromkeys(method.name for method in methods))
        raise UserError(f"the baseline {chosen!r} is not one of the methods {names}.")


def _named(methods: Sequence[Method], name: str | None) -> Method | None:
    """Find the method of this name, or the first that had it before distinguishing settings were
    added."""
    exact = [m for m in methods if m.name == name]
    short = [m for m in methods if m.runs[0].method == name]
    return next(iter(exact + short), None)


def with_comparisons(methods: Sequence[Method], baseline: Method) -> list[Method]:
    """Add to all methods except the baseline their difference from it, with p-values corrected for
    the number of methods."""
    others = [method for method in methods if method is not baseline]
    found = [
        compare(each.pass_by_seed, baseline.pass_by_seed, baseline.keys, limits=(-1, 1))
        for each in others
    ]
    corrected = holm([comparison.p_value for comparison in found])
    compared = {
        id(method): replace(method, to_baseline=comparison, corrected_p=p)
        for method, comparison, p in zip(others, found, corrected, strict=True)
    }
    return [compared.get(id(method), method) for method in methods]
