"""The tables of a report, column by column, as texts for both HTML and Markdown."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from rlad.comparison.comparable import method_settings
from rlad.comparison.figures import Method
from rlad.comparison.finished_runs import PARTS, MissingRun
from rlad.comparison.imitation_map import FATES, ImitationMap
from rlad.config.file import changed_settings
from rlad.runs.statistics import Estimate

UNKNOWN = "–"


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell: a text, a smaller text after it, and the number by which the column is sorted."""

    text: str
    small: str = ""
    order: float | None = None

    def __str__(self) -> str:
        return f"{self.text} {self.small}".rstrip()


@dataclass(frozen=True, slots=True)
class Table:
    """A table. `columns` have a name and a meaning each; `rows` have a cell per column, and the
    first cell names the row."""

    caption: str
    columns: Sequence[tuple[str, str]]
    rows: Sequence[Sequence[Cell]]

    def is_numeric(self, column: int) -> bool:
        return any(row[column].order is not None for row in self.rows)


Column = tuple[str, str, Callable[[Method], Cell]]
"""Name, meaning, and the function that makes the cell of a method."""


def results_table(methods: Sequence[Method], baseline: str) -> Table:
    """Show pass@1 on the test split, and the difference to the baseline."""
    columns: list[Column] = [
        ("seeds", "number of trained runs", lambda m: number(len(m.runs))),
        ("before", "pass@1 of the untrained student", lambda m: share(m.before.mean)),
        ("after", "pass@1 after the last step", lambda m: estimate(m.after)),
        ("sd over seeds", "standard deviation, in points", lambda m: number(100 * m.sd, ".1f")),
        ("gain", "after minus before, in points", lambda m: difference(m.gain)),
    ]
    if any(m.to_baseline for m in methods):
        meaning = f"pass@1 minus that of {baseline}, in points, on the same problems and seeds"
        columns += [
            (f"minus {baseline}", meaning, _to_baseline),
            ("p", "paired permutation test by prompt, two-sided", lambda m: _p(m.p_value)),
            ("p, Holm", "corrected for the comparisons of this table", lambda m: _p(m.corrected_p)),
        ]
    caption = "Test pass@1; sd, gain and difference in points; 95 % intervals in brackets"
    return make_table(caption, methods, columns)


def breakdown_table(methods: Sequence[Method]) -> Table:
    """Show pass@k, pass@1 by difficulty and out of distribution, length and truncation."""
    columns: list[Column] = []
    for k in list(methods[0].pass_at_k)[1:]:
        meaning = f"at least one of {k} completions is correct"
        columns.append((f"pass@{k}", meaning, lambda m, k=k: estimate(m.pass_at_k[k])))
    for name in methods[0].by_difficulty:
        meaning = "pass@1 on the test problems of this difficulty"
        columns.append((name, meaning, lambda m, name=name: estimate(m.by_difficulty[name])))
    if methods[0].ood:
        meaning = "pass@1 on problems that differ from those of the training"
        columns.append(("out of distribution", meaning, lambda m: estimate(m.ood)))
    if not all(math.isnan(m.num_turns) for m in methods):
        meaning = "mean number of turns of an episode, solved or not"
        columns.append(("turns", meaning, lambda m: number(m.num_turns, ",.1f")))
    columns += [
        ("tokens", "mean completion length", lambda m: number(m.completion_tokens, ",.1f")),
        ("truncated", "share that reached a limit", lambda m: share(m.truncated_share)),
    ]
    return make_table("Test after training, in detail", methods, columns)


def cost_table(methods: Sequence[Method]) -> Table:
    """Show the cost of a run, without evaluation and loading."""
    columns: list[Column] = [
        ("steps", "optimiser steps of a run", lambda m: number(m.num_steps)),
        ("seconds", "training time of a run", lambda m: number(m.total_seconds)),
        ("s / step", "training time of a step", lambda m: number(m.seconds_per_step, ",.2f")),
    ]
    for part in PARTS:
        meaning = "share of the training time"
        columns.append((part, meaning, lambda m, part=part: share(m.share_of_time(part))))
    sampled = "tokens of all rollouts of a run, written by the student"
    scored = "tokens that the teacher scored or wrote"
    memory = "peak memory of a run"
    columns += [
        ("sampled tokens", sampled, lambda m: number(fmean(r.completion_tokens for r in m.runs))),
        ("teacher tokens", scored, lambda m: number(fmean(r.teacher_tokens for r in m.runs))),
        ("peak memory, MiB", memory, lambda m: number(m.peak_memory / 2**20)),
    ]
    return make_table("Cost of a run, mean over seeds", methods, columns)


def methods_table(methods: Sequence[Method]) -> Table:
    """Show how the methods differ: objective, settings other than the default, and what the clip
    did."""
    meaning = "`rlad list objectives NAME` explains it"
    columns: list[Column] = [
        ("objective", meaning, lambda m: Cell(m.config.objective.type)),
        (
            "learning rate",
            "that of AdamW",
            lambda m: number(m.config.optimization.learning_rate, "g"),
        ),
        ("other settings that are not the default", "", _other_settings),
    ]
    if any(m.gated_positive > 0 or m.gated_negative > 0 for m in methods):
        meaning = "share of these tokens without gradient because of the clip, mean over steps"
        columns += [
            ("gated, advantage > 0", meaning, lambda m: share(m.gated_positive)),
            ("gated, advantage < 0", meaning, lambda m: share(m.gated_negative)),
        ]
    return make_table("How the methods differ", methods, columns)


def missing_table(missing: Sequence[MissingRun]) -> Table:
    """Show the runs that are not in the tables, and why."""
    rows = [
        [Cell(m.method), number(math.nan if m.seed is None else m.seed), Cell(m.reason)]
        for m in missing
    ]
    columns = [("method", ""), ("seed", ""), ("why", "")]
    return Table("Runs that are not in the tables", columns, rows)


def phases_table(found: ImitationMap) -> Table:
    """Show the shares of each fate early, in the middle and late in a run."""
    columns = [
        ("part of the run", ""),
        ("tokens", ""),
        *((fate.name, fate.meaning) for fate in FATES),
        ("clamped", "the log-ratio to the teacher was beyond the limit and was clamped"),
    ]
    rows = [
        [
            Cell(phase.name, f"steps {min(phase.steps)}–{max(phase.steps)}"),
            number(phase.num_tokens),
            *(share(phase.share(fate.letter)) for fate in FATES),
            share(phase.share("c")),
        ]
        for phase in found.phases
    ]
    caption = f"{found.method}, seed {found.seed}: shares of the tokens of all recorded completions"
    return Table(caption, columns, rows)


def make_table(caption: str, methods: Sequence[Method], columns: Sequence[Column]) -> Table:
    names = [("method", ""), *((name, meaning) for name, meaning, _ in columns)]
    return Table(
        caption, names, [[Cell(m.name), *(cell(m) for _, _, cell in columns)] for m in methods]
    )


# --- cells ----------------------------------------------------------------------------------------


def number(value: float, form: str = ",.0f") -> Cell:
    return Cell(UNKNOWN) if math.isnan(value) else Cell(f"{value:{form}}", order=value)


def share(value: float) -> Cell:
    return number(value, ".1%")


def estimate(found: Estimate | None) -> Cell:
    if found is None:
        return Cell(UNKNOWN)
    interval = f"[{100 * found.low:.1f}, {100 * found.high:.1f}]"
    return Cell(f"{found.mean:.1%}", interval, found.mean)


def difference(found: Estimate) -> Cell:
    """Show a difference of shares in points."""
    return Cell(_signed(found.mean), f"[{_signed(found.low)}, {_signed(found.high)}]", found.mean)


def _signed(share: float) -> str:
    text = f"{100 * share:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "\N{MINUS SIGN}")


def _to_baseline(method: Method) -> Cell:
    compared = method.to_baseline
    if compared is None:
        return Cell("baseline", order=0.0)
    cell = difference(compared.difference)
    # If it is over all seeds of the method, the column of seeds already says so.
    if not compared.is_paired_by_seed:
        return Cell(cell.text, f"{cell.small} no shared seeds", cell.order)
    if compared.num_seeds < len(method.runs):
        return Cell(cell.text, f"{cell.small} {compared.num_seeds} shared seed(s)", cell.order)
    return cell


def _p(p: float) -> Cell:
    return Cell(UNKNOWN) if math.isnan(p) else Cell(p_text(p), order=p)


def p_text(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _other_settings(method: Method) -> Cell:
    run = method.runs[0]
    own = method_settings(run).keys() - {"objective.type", "optimization.learning_rate"}
    changed = changed_settings(run.config).items()
    return Cell(", ".join(f"{key} = {value}" for key, value in changed if key in own) or UNKNOWN)
