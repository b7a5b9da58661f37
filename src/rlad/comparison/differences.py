"""The differences of methods from the baseline: with intervals, by problem, and in the cost of
reaching the same result."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.figure import Figure

from rlad.comparison.figures import Method
from rlad.comparison.finished_runs import Run
from rlad.comparison.looks import looks_of
from rlad.comparison.report_columns import Cell, Column, Table, make_table, number
from rlad.comparison.report_plots import SETTINGS, Plot, make_plot, short_name
from rlad.runs.curve import STYLE

_NEVER = Cell("not reached")


def draw_differences(methods: Sequence[Method], baseline: Method) -> list[Plot]:
    """Draw the difference of each method with its interval, and its wins and losses by problem;
    nothing if there is nothing to compare."""
    compared = [m for m in methods if m.to_baseline]
    if not compared:
        return []
    with matplotlib.style.context([*STYLE, SETTINGS]):
        return [_intervals(compared, baseline), _problems(compared, baseline)]


def _intervals(compared: Sequence[Method], baseline: Method) -> Plot:
    looks = looks_of([m.name for m in (*compared, baseline)])
    figure = Figure(figsize=(5.2, 0.42 * len(compared) + 1.0), layout="constrained")
    axes = figure.subplots()
    for place, m in enumerate(reversed(compared)):
        assert m.to_baseline is not None
        found = m.to_baseline.difference
        bounds = [100 * value for value in (found.low, found.mean, found.high)]
        axes.plot(bounds, [place] * 3, markevery=[1], markersize=8, **looks[m.name])
    axes.axvline(0, color="black", linewidth=1)
    axes.set_yticks(range(len(compared)), [short_name(m.name) for m in reversed(compared)])
    axes.set(xlabel=f"points above {short_name(baseline.name)}", ylim=(-0.6, len(compared) - 0.4))
    caption = (
        f"Test pass@1 minus that of {baseline.name}, with 95 % intervals over seeds and problems. "
        "An interval that crosses the line leaves open which is better."
    )
    return make_plot(figure, "Differences", caption)


def _problems(compared: Sequence[Method], baseline: Method) -> Plot:
    looks = looks_of([m.name for m in (*compared, baseline)])
    figure = Figure(figsize=(5.2, 3.1), layout="constrained")
    axes = figure.subplots()
    for m in compared:
        values = 100 * np.sort(by_problem(m, baseline))[::-1]
        share = 100 * (np.arange(len(values)) + 0.5) / len(values)
        look: dict[str, Any] = looks[m.name] | {"markevery": max(1, len(values) // 6)}
        axes.plot(share, values, drawstyle="steps-mid", label=short_name(m.name), **look)
    axes.axhline(0, color="black", linewidth=1)
    axes.set(xlabel="% of the test problems, best first", ylabel="points, mean over seeds")
    axes.legend()
    caption = (
        f"Problem by problem: how much more often a method solves it than {baseline.name}, "
        "sorted. Left of the crossing are its wins, right its losses; a flat part at 0 are "
        "problems on which both are equal."
    )
    return make_plot(figure, "Wins and losses", caption)


def by_problem(method: Method, baseline: Method) -> np.ndarray:
    """Return pass@1 of each test problem, mean over seeds, minus the baseline's."""
    means = [np.mean(list(each.pass_by_seed.values()), axis=0) for each in (method, baseline)]
    return means[0] - means[1]


def problems_table(methods: Sequence[Method], baseline: Method) -> Table:
    """Count the problems that a method solves more and less often than the baseline."""

    def count(wanted: int) -> Column:
        names = {1: "wins", 0: "equal", -1: "losses"}
        meaning = {1: "more often", 0: "equally often", -1: "less often"}[wanted]
        return (
            names[wanted],
            f"problems solved {meaning} than by {baseline.name}, over all seeds",
            lambda m: number(int((np.sign(by_problem(m, baseline)) == wanted).sum())),
        )

    def only(swapped: bool) -> Column:
        who = f"only by {baseline.name}" if swapped else "only by it"
        return (
            who,
            "solved at least once by one of the two alone",
            lambda m: number(int(_alone(*((baseline, m) if swapped else (m, baseline))).sum())),
        )

    compared = [m for m in methods if m.to_baseline]
    columns = [count(1), count(0), count(-1), only(False), only(True)]
    return make_table(f"Test problems against {baseline.name}", compared, columns)


def _alone(one: Method, other: Method) -> np.ndarray:
    solved = [np.any(np.array(list(m.pass_by_seed.values())) > 0, axis=0) for m in (one, other)]
    return solved[0] & ~solved[1]


# --- cost to a target -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Reached:
    """What a method's runs had spent on average when their mean validation pass@1 first reached the
    target."""

    step: int
    seconds: float
    sampled_tokens: float
    teacher_tokens: float


def target_table(methods: Sequence[Method], baseline: Method) -> Table | None:
    """Show the cost of reaching the validation pass@1 at which the baseline ends; None if that is
    not above its start."""
    target = validation_curve(baseline)
    if not target or target[max(target)] <= target[min(target)]:
        return None
    goal = target[max(target)]
    reached = {m.name: reach(m, goal) for m in methods}

    def column(name: str, meaning: str, field: str) -> Column:
        def cell(m: Method) -> Cell:
            found = reached[m.name]
            return _NEVER if found is None else number(getattr(found, field))

        return name, meaning, cell

    columns = [
        column("step", "the first validation at which the mean over seeds is there", "step"),
        column("seconds", "of training until then", "seconds"),
        column("sampled tokens", "written by the student until then", "sampled_tokens"),
        column("teacher tokens", "scored or written until then", "teacher_tokens"),
    ]
    caption = f"To reach {goal:.1%} validation pass@1, where {baseline.name} ends; mean over seeds"
    return make_table(caption, methods, columns)


def validation_curve(method: Method) -> dict[int, float]:
    """Return mean validation pass@1 by step, at the steps that all seeds have."""
    values = [run.validation for run in method.runs]
    steps = sorted(set.intersection(*map(set, values)))
    return {step: fmean(run[step] for run in values) for step in steps}


def reach(method: Method, goal: float) -> Reached | None:
    """Return the cost of reaching a validation pass@1; None if it was not reached."""
    there = [step for step, value in validation_curve(method).items() if value >= goal - 1e-12]
    if not there:
        return None
    step = there[0]
    spent = [_spent(run, step) for run in method.runs]
    return Reached(step, *(fmean(column) for column in zip(*spent, strict=True)))


def _spent(run: Run, step: int) -> tuple[float, float, float]:
    rows = [row for row in run.history.steps if row["step"] <= step]
    seconds = sum(v for row in rows for key, v in row.items() if key.startswith("time/"))
    rollout = run.config.rollout
    per_step = rollout.prompts_per_batch * rollout.group_size
    per_step /= run.config.optimization.steps_per_rollout_batch
    lengths = run.completion_lengths
    sampled = per_step * sum(lengths.get(int(row["step"]), 0.0) for row in rows)
    scored = sum(row.get("teacher/tokens/count", 0.0) for row in rows)
    return seconds, sampled, scored
