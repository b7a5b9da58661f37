"""Figures and a table for a paper: vector files of column width, colours that colour-blind readers
can distinguish (lines and markers differ too), and LaTeX."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib.style
import numpy as np
from matplotlib.figure import Figure

from rlad.comparison.figures import Method
from rlad.comparison.finished_runs import Run
from rlad.comparison.looks import looks_of
from rlad.comparison.report_plots import CURVES, short_name
from rlad.errors import UserError
from rlad.runs.curve import STYLE, curve
from rlad.runs.statistics import Estimate
from rlad.text import printable

COLUMN_INCHES = 3.3
SETTINGS = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "legend.fontsize": 7,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "pdf.fonttype": 42,  # fonts that publishers take
    "svg.fonttype": "none",
    "svg.hashsalt": "rlad",
}
FORMS = ("pdf", "svg")
TABLE = "results.tex"


def write_figures(methods: Sequence[Method], baseline: Method, folder: Path) -> list[Path]:
    """Write results, differences and curves as PDF and SVG, and the table of results. Returns the
    files. Raises `UserError` if the folder cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files = []
        with matplotlib.style.context([*STYLE, SETTINGS]):
            for name, figure in _figures(methods, baseline).items():
                for form in FORMS:
                    path = folder / f"{name}.{form}"
                    # No date, so that the same runs give the same bytes.
                    date = {"CreationDate": None} if form == "pdf" else {"Date": None}
                    figure.savefig(path, metadata=date)
                    files.append(path)
        table = folder / TABLE
        table.write_text(latex_table(methods, baseline), encoding="utf-8")
        return [*files, table]
    except OSError as error:
        raise UserError(
            f"figures cannot be written to {folder} ({error.strerror}); give another --figures."
        ) from None


def _figures(methods: Sequence[Method], baseline: Method) -> dict[str, Figure]:
    looks = looks_of([m.name for m in methods])
    compared = [m for m in methods if m.to_baseline]
    figures = {"results": _bars(methods, looks, lambda m: m.after, "test pass@1 (%)")}
    if compared:
        label = f"points above {short_name(baseline.name)}"
        figures["differences"] = _bars(compared, looks, _difference, label)
        figures["differences"].axes[0].axvline(0, color="black", linewidth=0.8)
    for title, label, series, _ in CURVES:
        figure = _curve(methods, looks, label, series)
        if figure is not None:
            figures[re.sub(r"\W+", "-", title.lower())] = figure
    return figures


def _difference(method: Method) -> Estimate:
    assert method.to_baseline is not None
    return method.to_baseline.difference


def _bars(
    methods: Sequence[Method], looks: dict, value: Callable[[Method], Estimate], label: str
) -> Figure:
    """Draw a mean with its interval for each method."""
    height = 0.2 * len(methods) + 0.55
    figure = Figure(figsize=(COLUMN_INCHES, height), layout="constrained")
    axes = figure.subplots()
    for place, m in enumerate(reversed(methods)):
        found = value(m)
        bounds = [100 * one for one in (found.low, found.mean, found.high)]
        look = looks[m.name] | {"linewidth": 1.4, "markersize": 4.5}
        axes.plot(bounds, [place] * 3, markevery=[1], **look)
    axes.set_yticks(range(len(methods)), [short_name(m.name, 24) for m in reversed(methods)])
    axes.set(xlabel=label, ylim=(-0.6, len(methods) - 0.4))
    return figure


def _curve(
    methods: Sequence[Method],
    looks: dict,
    label: str,
    series: Callable[[Run], dict[int, float]],
) -> Figure | None:
    """Draw the mean over seeds with the band of the seeds; None if no run has recorded it."""
    figure = Figure(figsize=(COLUMN_INCHES, 2.2), layout="constrained")
    axes = figure.subplots()
    for m in methods:
        values = [series(run) for run in m.runs]
        steps = sorted(set.intersection(*map(set, values)))
        if steps:
            seeds = np.array([[run[step] for step in steps] for run in values])
            spacing = max(1, len(steps) // 6)
            look = looks[m.name] | {"linewidth": 1.2, "markersize": 3, "markevery": spacing}
            low, high = seeds.min(axis=0), seeds.max(axis=0)
            curve(axes, steps, seeds.mean(axis=0), low, high, label=short_name(m.name, 24), **look)
    if not axes.lines:
        return None
    axes.set(xlabel="step", ylabel=label)
    axes.legend(frameon=False)
    return figure


def latex_table(methods: Sequence[Method], baseline: Method) -> str:
    """Return the table of results for the package booktabs."""
    lines = [
        "% needs \\usepackage{booktabs}; intervals are 95 %, over seeds and problems",
        "\\begin{tabular}{lrrr}",
        "\\toprule",
        f"method & seeds & pass@1 (\\%) & minus {_latex(baseline.name)} (points) \\\\",
        "\\midrule",
    ]
    for m in methods:
        gap = "baseline" if m.to_baseline is None else _signed(m.to_baseline.difference)
        after = f"{_number(m.after.mean)} [{_number(m.after.low)}, {_number(m.after.high)}]"
        lines.append(f"{_latex(m.name)} & {len(m.runs)} & {after} & {gap} \\\\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", ""])


def _number(share: float) -> str:
    return f"{100 * share:.1f}"


def _signed(found: Estimate) -> str:
    mean, low, high = (f"${100 * one:+.1f}$" for one in (found.mean, found.low, found.high))
    return f"{mean} [{low}, {high}]"


_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
} | {c: f"\\{c}" for c in "&%$#_{}"}


def _latex(text: str) -> str:
    """Escape a name for LaTeX."""
    return "".join(_LATEX.get(c, c) for c in " ".join(printable(text).split()))
