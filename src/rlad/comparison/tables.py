"""The tables of a report, as texts that HTML and Markdown show alike."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rlad.comparison.comparable import method_settings
from rlad.comparison.methods import MethodFigures
from rlad.comparison.runs import PARTS, MissingRun
from rlad.config.file import changed_settings
from rlad.runs.statistics import Estimate

UNKNOWN = "–"


@dataclass(frozen=True, slots=True)
class Cell:
    """What stands in a field: a text, a smaller text behind it, and the number that the column is
    sorted by."""

    text: str
    small: str = ""
    order: float | None = None


@dataclass(frozen=True, slots=True)
class Table:
    """`columns` and, for each, what it means; `rows` of as many cells, the first naming the row."""

    name: str
    caption: str
    columns: Sequence[str]
    meanings: Sequence[str]
    rows: Sequence[Sequence[Cell]]

    def is_numeric(self, column: int) -> bool:
        return any(row[column].order is not None for row in self.rows)


Column = tuple[str, str, list[Cell]]


def results_table(figures: Sequence[MethodFigures], baseline: str) -> Table:
    """pass@1 on the test split, and the difference to the baseline."""
    columns: list[Column] = [
        ("seeds", "number of trained runs", [_number(len(f.method.runs)) for f in figures]),
        ("before", "pass@1 of the untrained student", [_share(f.before.mean) for f in figures]),
        (
            "after",
            "pass@1 after the last step, with 95 % interval",
            [_estimate(f.after) for f in figures],
        ),
        (
            "sd over seeds",
            "standard deviation of pass@1 over seeds, in points",
            [_points(f.sd) for f in figures],
        ),
        (
            "gain",
            "after minus before, in points, with 95 % interval",
            [_difference(f.gain) for f in figures],
        ),
    ]
    if any(f.to_baseline for f in figures):
        is_alone = all(
            f.to_baseline is None or f.to_baseline.num_seeds == len(f.method.runs) for f in figures
        )
        meaning = f"pass@1 minus that of {baseline}, in points, on the same problems and seeds, with 95 % interval"
        columns += [
            (
                f"minus {baseline}",
                meaning,
                [_to_baseline(f, say_seeds=not is_alone) for f in figures],
            ),
            (
                "p",
                "paired permutation test by prompt, two-sided",
                [_p(f, corrected=False) for f in figures],
            ),
            (
                "p, Holm",
                "the same, corrected for the comparisons of this table",
                [_p(f, corrected=True) for f in figures],
            ),
        ]
    return _table(
        "results",
        "Test pass@1; sd, gain and difference in points; in brackets 95 % intervals",
        figures,
        columns,
    )


def breakdown_table(figures: Sequence[MethodFigures]) -> Table:
    """pass@k, out of distribution, by difficulty, length, truncation."""
    k = max(figures[0].pass_at_k)
    columns: list[Column] = []
    if k > 1:
        meaning = f"at least one of {k} completions is correct, with 95 % interval"
        columns.append((f"pass@{k}", meaning, [_estimate(f.pass_at_k[k]) for f in figures]))
    for name in figures[0].by_difficulty:
        meaning = "pass@1 on the test problems of this difficulty, with 95 % interval"
        columns.append((name, meaning, [_estimate(f.by_difficulty[name]) for f in figures]))
    if figures[0].ood:
        meaning = "pass@1 on problems unlike those of the training, with 95 % interval"
        columns.append(("out of distribution", meaning, [_estimate(f.ood) for f in figures]))
    columns += [
        (
            "tokens",
            "mean completion length on the test split",
            [_number(f.completion_tokens, 1) for f in figures],
        ),
        (
            "truncated",
            "share of test completions that reached the token limit",
            [_share(f.truncated_share) for f in figures],
        ),
    ]
    return _table("breakdown", "Test after training, in detail", figures, columns)


def cost_table(figures: Sequence[MethodFigures]) -> Table:
    """What a run costs, evaluation and loading left out."""
    costs = [f.cost for f in figures]
    columns: list[Column] = [
        ("steps", "optimiser steps of a run", [_number(c.num_steps) for c in costs]),
        ("seconds", "training time of a run", [_number(c.total_seconds) for c in costs]),
        (
            "s / step",
            "the same by step",
            [_number(c.total_seconds / (c.num_steps or math.nan), 2) for c in costs],
        ),
        *(
            (part, "share of the training time", [_share(c.share(part)) for c in costs])
            for part in PARTS
        ),
        (
            "sampled tokens",
            "tokens of all rollouts of a run, written by the student",
            [_number(c.completion_tokens) for c in costs],
        ),
        (
            "teacher tokens",
            "tokens that the teacher scored or wrote",
            [_number(c.teacher_tokens) for c in costs],
        ),
        (
            "peak memory",
            "most memory that a run has held, in MiB",
            [_number(c.peak_memory / 2**20) for c in costs],
        ),
    ]
    return _table("cost", "Cost of a run, mean over seeds", figures, columns)


def methods_table(figures: Sequence[MethodFigures]) -> Table:
    """What tells the methods apart: objective, teacher, and settings that are not the default."""
    runs = [f.method.runs[0] for f in figures]
    shown = ("objective.type", "optimization.learning_rate")
    own = [
        [
            f"{k} = {v}"
            for k, v in changed_settings(run.config).items()
            if k in method_settings(run) and k not in shown
        ]
        for run in runs
    ]
    columns: list[Column] = [
        (
            "objective",
            "`rlad list objectives NAME` explains it",
            [Cell(run.config.objective.type) for run in runs],
        ),
        (
            "learning rate",
            "of AdamW",
            [_number(run.config.optimization.learning_rate, None) for run in runs],
        ),
        (
            "other settings that are not the default",
            "",
            [Cell(", ".join(settings) or UNKNOWN) for settings in own],
        ),
    ]
    return _table("methods", "What tells the methods apart", figures, columns)


def missing_table(missing: Sequence[MissingRun]) -> Table:
    rows = [
        [Cell(m.method), Cell(UNKNOWN) if m.seed is None else _number(m.seed), Cell(m.reason)]
        for m in missing
    ]
    return Table(
        "missing", "Runs that are not in the tables", ("method", "seed", "why"), ("", "", ""), rows
    )


def _table(
    name: str, caption: str, figures: Sequence[MethodFigures], columns: Sequence[Column]
) -> Table:
    rows = [[Cell(f.name), *(cells[i] for _, _, cells in columns)] for i, f in enumerate(figures)]
    return Table(
        name, caption, ["method", *(c[0] for c in columns)], ["", *(c[1] for c in columns)], rows
    )


def _number(value: float, digits: int | None = 0) -> Cell:
    if math.isnan(value):
        return Cell(UNKNOWN)
    return Cell(f"{value:g}" if digits is None else f"{value:,.{digits}f}", order=value)


def _share(value: float) -> Cell:
    return Cell(UNKNOWN) if math.isnan(value) else Cell(f"{value:.1%}", order=value)


def _points(value: float) -> Cell:
    return Cell(UNKNOWN) if math.isnan(value) else Cell(f"{100 * value:.1f}", order=value)


def _estimate(estimate: Estimate | None) -> Cell:
    if estimate is None:
        return Cell(UNKNOWN)
    return Cell(
        f"{estimate.mean:.1%}",
        f"[{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]",
        estimate.mean,
    )


def _difference(estimate: Estimate) -> Cell:
    return Cell(
        signed(estimate.mean), f"[{signed(estimate.low)}, {signed(estimate.high)}]", estimate.mean
    )


def _to_baseline(figures: MethodFigures, *, say_seeds: bool) -> Cell:
    compared = figures.to_baseline
    if compared is None:
        return Cell("baseline", order=0.0)
    cell = _difference(compared.difference)
    seeds = (
        f" {compared.num_seeds} shared seed(s)"
        if compared.is_paired_by_seed
        else " no shared seeds"
    )
    return Cell(cell.text, cell.small + (seeds if say_seeds else ""), cell.order)


def _p(figures: MethodFigures, *, corrected: bool) -> Cell:
    if figures.to_baseline is None:
        return Cell(UNKNOWN)
    p = figures.corrected_p if corrected else figures.to_baseline.p_value
    return Cell(p_text(p), order=p)


def signed(share: float) -> str:
    """A difference of shares in points, with its sign."""
    text = f"{100 * share:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "\N{MINUS SIGN}")


def p_text(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"
