"""The tables of a report, as texts that HTML and Markdown show alike."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from rlad.comparison.comparable import method_settings
from rlad.comparison.imitation_map import FATES, ImitationMap
from rlad.comparison.methods import MethodFigures
from rlad.comparison.runs import PARTS, MissingRun
from rlad.config.file import changed_settings
from rlad.runs.statistics import Estimate

UNKNOWN = "–"


@dataclass(frozen=True, slots=True)
class Cell:
    """A field: a text, a smaller text after it, and the number that the column is sorted by."""

    text: str
    small: str = ""
    order: float | None = None


@dataclass(frozen=True, slots=True)
class Table:
    """A table of `columns`, each with its meaning, and `rows` of as many cells, the first naming
    the row."""

    kind: ClassVar = "table"
    caption: str
    columns: Sequence[str]
    meanings: Sequence[str]
    rows: Sequence[Sequence[Cell]]

    def is_numeric(self, column: int) -> bool:
        return any(row[column].order is not None for row in self.rows)


Column = tuple[str, str, Callable[[MethodFigures], Cell]]
"""name, meaning, and the cell of a method"""


def results_table(figures: Sequence[MethodFigures], baseline: str) -> Table:
    """Show pass@1 on the test split, and the difference to the baseline."""
    columns: list[Column] = [
        ("seeds", "number of trained runs", lambda f: _number(len(f.method.runs))),
        ("before", "pass@1 of the untrained student", lambda f: _share(f.before.mean)),
        ("after", "pass@1 after the last step", lambda f: _estimate(f.after)),
        (
            "sd over seeds",
            "standard deviation of pass@1, in points",
            lambda f: _number(100 * f.sd, ".1f"),
        ),
        ("gain", "after minus before, in points", lambda f: _difference(f.gain)),
    ]
    compared = [(f, f.to_baseline) for f in figures if f.to_baseline]
    if compared:
        # Where all are compared over all of their seeds, the column of seeds says so.
        says_seeds = any(found.num_seeds < len(f.method.runs) for f, found in compared)
        name = f"minus {baseline}"
        meaning = f"pass@1 minus that of {baseline}, in points, on the same problems and seeds"
        columns += [
            (name, meaning, lambda f: _to_baseline(f, says_seeds=says_seeds)),
            ("p", "paired permutation test by prompt, two-sided", lambda f: _p(f.p_value)),
            ("p, Holm", "corrected for the comparisons of this table", lambda f: _p(f.corrected_p)),
        ]
    caption = "Test pass@1; sd, gain and difference in points; in brackets 95 % intervals"
    return _table(caption, figures, columns)


def breakdown_table(figures: Sequence[MethodFigures]) -> Table:
    """Show pass@k, pass@1 by difficulty and out of distribution, length and truncation."""
    k = max(figures[0].pass_at_k)
    columns: list[Column] = []
    if k > 1:
        meaning = f"at least one of {k} completions is correct"
        columns.append((f"pass@{k}", meaning, lambda f: _estimate(f.pass_at_k[k])))
    for name in figures[0].by_difficulty:
        meaning = "pass@1 on the test problems of this difficulty"
        columns.append((name, meaning, lambda f, name=name: _estimate(f.by_difficulty[name])))
    if figures[0].ood:
        meaning = "pass@1 on problems unlike those of the training"
        columns.append(("out of distribution", meaning, lambda f: _estimate(f.ood)))
    columns += [
        ("tokens", "mean completion length", lambda f: _number(f.completion_tokens, ",.1f")),
        ("truncated", "share that reached the token limit", lambda f: _share(f.truncated_share)),
    ]
    return _table("Test after training, in detail", figures, columns)


def cost_table(figures: Sequence[MethodFigures]) -> Table:
    """Show what a run costs, evaluation and loading left out."""
    columns: list[Column] = [
        ("steps", "optimiser steps of a run", lambda f: _number(f.cost.num_steps)),
        ("seconds", "training time of a run", lambda f: _number(f.cost.total_seconds)),
        ("s / step", "the same by step", lambda f: _number(f.cost.seconds_per_step, ",.2f")),
    ]
    for part in PARTS:
        meaning = "share of the training time"
        columns.append((part, meaning, lambda f, part=part: _share(f.cost.share(part))))
    sampled = "tokens of all rollouts of a run, written by the student"
    scored = "tokens that the teacher scored or wrote"
    memory = "most memory that a run has held, in MiB"
    columns += [
        ("sampled tokens", sampled, lambda f: _number(f.cost.completion_tokens)),
        ("teacher tokens", scored, lambda f: _number(f.cost.teacher_tokens)),
        ("peak memory", memory, lambda f: _number(f.cost.peak_memory / 2**20)),
    ]
    return _table("Cost of a run, mean over seeds", figures, columns)


def methods_table(figures: Sequence[MethodFigures]) -> Table:
    """Show what tells the methods apart: objective, teacher, and settings that are not the
    default."""
    columns: list[Column] = [
        (
            "objective",
            "`rlad list objectives NAME` explains it",
            lambda f: Cell(f.method.config.objective.type),
        ),
        (
            "learning rate",
            "of AdamW",
            lambda f: _number(f.method.config.optimization.learning_rate, "g"),
        ),
        ("other settings that are not the default", "", _other_settings),
    ]
    return _table("What tells the methods apart", figures, columns)


def _other_settings(figures: MethodFigures) -> Cell:
    run = figures.method.runs[0]
    own = method_settings(run).keys() - {"objective.type", "optimization.learning_rate"}
    changed = changed_settings(run.config).items()
    return Cell(", ".join(f"{key} = {value}" for key, value in changed if key in own) or UNKNOWN)


def missing_table(missing: Sequence[MissingRun]) -> Table:
    """Show the runs that are not in the tables, and why."""
    rows = [
        [Cell(m.method), _number(math.nan if m.seed is None else m.seed), Cell(m.reason)]
        for m in missing
    ]
    return Table("Runs that are not in the tables", ("method", "seed", "why"), ("",) * 3, rows)


def phases_table(found: ImitationMap) -> Table:
    """Show the shares of each fate early, in the middle and late in a run."""
    rows = [
        [
            Cell(phase.name, f"steps {phase.first_step}–{phase.last_step}"),
            _number(phase.num_tokens),
            *(_share(phase.shares[fate.name]) for fate in FATES),
            _share(phase.clamped),
        ]
        for phase in found.phases
    ]
    return Table(
        f"{found.method}, seed {found.seed}: shares of the tokens of all recorded completions",
        ("part of the run", "tokens", *(fate.name for fate in FATES), "clamped"),
        (
            "",
            "",
            *(fate.meaning for fate in FATES),
            "the log-ratio to the teacher was beyond the clamp and was cut",
        ),
        rows,
    )


def _table(caption: str, figures: Sequence[MethodFigures], columns: Sequence[Column]) -> Table:
    names, meanings, cells = zip(*columns, strict=True)
    rows = [[Cell(f.name), *(cell(f) for cell in cells)] for f in figures]
    return Table(caption, ("method", *names), ("", *meanings), rows)


def _number(value: float, form: str = ",.0f") -> Cell:
    return Cell(UNKNOWN) if math.isnan(value) else Cell(f"{value:{form}}", order=value)


def _share(value: float) -> Cell:
    return _number(value, ".1%")


def _estimate(estimate: Estimate | None) -> Cell:
    if estimate is None:
        return Cell(UNKNOWN)
    interval = f"[{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"
    return Cell(f"{estimate.mean:.1%}", interval, estimate.mean)


def _difference(estimate: Estimate, suffix: str = "") -> Cell:
    interval = f"[{signed(estimate.low)}, {signed(estimate.high)}]"
    return Cell(signed(estimate.mean), f"{interval}{suffix}", estimate.mean)


def _to_baseline(figures: MethodFigures, *, says_seeds: bool) -> Cell:
    compared = figures.to_baseline
    if compared is None:
        return Cell("baseline", order=0.0)
    seeds = " no shared seeds"
    if compared.is_paired_by_seed:
        seeds = f" {compared.num_seeds} shared seed(s)"
    return _difference(compared.difference, suffix=seeds if says_seeds else "")


def _p(p: float) -> Cell:
    return Cell(UNKNOWN) if math.isnan(p) else Cell(p_text(p), order=p)


def signed(share: float) -> str:
    """Write a difference of shares in points, with its sign."""
    text = f"{100 * share:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "\N{MINUS SIGN}")


def p_text(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"
