"""The plots of a report as SVG that takes its colours from the page, so that they fit light and
dark.

Methods are told apart by colour (Okabe and Ito's palette), line and marker; parts of the time by
colour and hatching.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from io import StringIO
from itertools import pairwise
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from rlad.comparison.methods import MethodFigures
from rlad.comparison.runs import PARTS, Run
from rlad.text import printable

_BLUE = "#0072b2"
SERIES_COLOURS = (_BLUE, "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_LINES, _MARKERS = ("-", "--", "-.", ":"), "osD^vPX*"
# Colours that stand for the page's: replaced by CSS variables in the SVG.
_INK, _MUTED = "#010101", "#020202"
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 9.5,
    "text.color": _INK,
    "axes.edgecolor": _MUTED,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _MUTED,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.frameon": False,
    "hatch.linewidth": 0.8,
}


@dataclass(frozen=True, slots=True)
class Plot:
    """An SVG that says in words what can be read from it, and its caption."""

    title: str
    caption: str
    svg: str
    is_wide: bool


@dataclass(frozen=True, slots=True)
class _Style:
    colour: str
    line: Any
    marker: str


def _style(index: int) -> _Style:
    colours = (*SERIES_COLOURS, _INK)
    return _Style(
        colours[index % len(colours)], _LINES[index % len(_LINES)], _MARKERS[index % len(_MARKERS)]
    )


def legend(figures: Sequence[MethodFigures]) -> Plot:
    """The key to colours, lines and markers of all plots of a table."""
    with matplotlib.rc_context(_STYLE):
        styles = [_style(i) for i in range(len(figures))]
        handles = [
            Line2D([], [], color=s.colour, linestyle=s.line, marker=s.marker, linewidth=2)
            for s in styles
        ]
        names = [_short(f.name) for f in figures]
        columns = max(1, min(4, len(names), 110 // (max(map(len, names)) + 10)))
        figure = Figure(figsize=(8.5, 0.3 * -(-len(names) // columns) + 0.1))
        figure.legend(handles, names, loc="center", ncols=columns, handlelength=4, fontsize=10)
        return _plot(figure, "Key to the plots", "", ", ".join(f.name for f in figures))


def draw_results(figures: Sequence[MethodFigures]) -> Plot:
    """Test pass@1 of each method with its interval, its seeds, and where it started."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(8.5, 0.42 * len(figures) + 0.9), layout="constrained")
        axes = figure.subplots()
        for i, f in enumerate(figures):
            style, y = _style(i), len(figures) - 1 - i
            seeds = [
                np.mean([r.num_correct / r.num_samples for r in run.after]) for run in f.method.runs
            ]
            axes.plot(
                [f.after.low, f.after.high],
                [y, y],
                color=style.colour,
                linewidth=2.5,
                solid_capstyle="butt",
            )
            axes.plot(f.after.mean, y, marker=style.marker, color=style.colour, markersize=9)
            ring = {
                "marker": "o",
                "markersize": 4,
                "markerfacecolor": "none",
                "markeredgecolor": _INK,
                "linestyle": "none",
            }
            axes.plot(seeds, [y - 0.24] * len(seeds), **ring)
            axes.plot(f.before.mean, y, marker="|", color=_INK, markersize=11)
        axes.set_yticks(range(len(figures)), [_short(f.name) for f in reversed(figures)])
        axes.set(xlabel="test pass@1", ylim=(-0.6, len(figures) - 0.5))
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
        told = "; ".join(f"{f.name} {f.after}, before {f.before.mean:.1%}" for f in figures)
        caption = "Test pass@1. Marker and bar: mean after training, 95 % interval; rings: each seed; stroke: before training."
        return _plot(figure, "Test pass@1", caption, told)


Series = Callable[[Run], dict[int, float]]


def _metric(key: str) -> Series:
    return lambda run: {row["step"]: row[key] for row in run.steps if key in row}


@dataclass(frozen=True, slots=True)
class _Curve:
    """`series`: the values of a run by step; where they are few they get markers."""

    title: str
    label: str
    series: Series
    has_markers: bool = False
    note: str = ""


_TRAINED_TOKENS = (
    " Over the trained tokens, so not comparable between methods that train on different tokens: "
    "grpo, trrd, rlsd and "
    "distilled_rl leave out tokens without advantage (unless kl_coef > 0); opd, kdrl and topd do "
    "not."
)
CURVES = (
    _Curve("Reward", "mean reward of the rollouts", _metric("reward/mean")),
    _Curve(
        "Validation pass@1",
        "pass@1 on the validation split",
        lambda run: dict(run.validation),
        has_markers=True,
    ),
    _Curve("Completion length", "mean tokens of the rollouts", lambda run: run.completion_lengths),
    _Curve(
        "Entropy",
        "nats, at the trained tokens",
        _metric("student/entropy/mean"),
        note=_TRAINED_TOKENS,
    ),
)


def draw_curves(figures: Sequence[MethodFigures]) -> list[Plot]:
    """Learning curves: mean over seeds, band from the lowest to the highest seed. One that no run
    has recorded is left out."""
    plots = []
    with matplotlib.rc_context(_STYLE):
        for curve in CURVES:
            figure = Figure(figsize=(5.2, 3.1), layout="constrained")
            axes, told, absent = figure.subplots(), [], []
            for i, f in enumerate(figures):
                steps, seeds = _by_step([curve.series(run) for run in f.method.runs])
                if not steps:
                    absent.append(f.name)
                    continue
                _draw_band(axes, steps, seeds, _style(i), has_markers=curve.has_markers)
                means = seeds.mean(axis=0)
                told.append(
                    f"{f.name} from {means[0]:.3g} at step {steps[0]} to {means[-1]:.3g} at step "
                    f"{steps[-1]}"
                )
            if not told:
                continue
            axes.set(xlabel="step", ylabel=curve.label)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            caption = (
                f"{curve.title} by step."
                + (f" Not recorded by {', '.join(absent)}." if absent else "")
                + curve.note
            )
            plots.append(_plot(figure, curve.title, caption, "; ".join(told)))
    return plots


def draw_pass_at_k(figures: Sequence[MethodFigures]) -> Plot | None:
    """pass@k over k; None with one completion a problem."""
    ks = list(figures[0].pass_at_k)
    if len(ks) < 2:
        return None
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(5.2, 3.1), layout="constrained")
        axes = figure.subplots()
        for i, f in enumerate(figures):
            style, estimates = _style(i), list(f.pass_at_k.values())
            means = [e.mean for e in estimates]
            axes.fill_between(
                ks,
                [e.low for e in estimates],
                [e.high for e in estimates],
                color=style.colour,
                alpha=0.13,
                lw=0,
            )
            axes.plot(
                ks,
                means,
                color=style.colour,
                linestyle=style.line,
                marker=style.marker,
                linewidth=2,
            )
        axes.set_xscale("log", base=2)
        axes.set_xticks(ks, [str(k) for k in ks])
        axes.minorticks_off()
        axes.set(xlabel="k", ylabel="test pass@k")
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")
        told = "; ".join(
            f"{f.name} {', '.join(f'pass@{k} {e.mean:.1%}' for k, e in f.pass_at_k.items())}"
            for f in figures
        )
        caption = "Test pass@k after training; band: 95 % interval."
        return _plot(figure, "pass@k", caption, told)


def draw_cost(figures: Sequence[MethodFigures]) -> Plot:
    """Where the training time of a run goes."""
    colours, hatches = ("#56B4E9", "#E69F00", "#009E73", _MUTED), ("", "///", "...", "xx")
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(8.5, 0.38 * len(figures) + 1.2), layout="constrained")
        axes = figure.subplots()
        for i, f in enumerate(reversed(figures)):
            edges = np.cumsum([0.0, *(f.cost.seconds[part] for part in PARTS)])
            for (left, right), colour, hatch in zip(pairwise(edges), colours, hatches, strict=True):
                axes.barh(
                    i,
                    right - left,
                    left=left,
                    height=0.62,
                    color=colour,
                    hatch=hatch,
                    edgecolor=_INK,
                    linewidth=0.7,
                )
        axes.set_yticks(range(len(figures)), [_short(f.name) for f in reversed(figures)])
        axes.set(xlabel="seconds of training, mean over seeds")
        axes.grid(visible=False, axis="y")
        keys = [
            Patch(facecolor=c, hatch=h, edgecolor=_INK, linewidth=0.7)
            for c, h in zip(colours, hatches, strict=True)
        ]
        figure.legend(keys, PARTS, loc="outside upper center", ncols=len(PARTS))
        told = "; ".join(
            f"{f.name} {f.cost.total_seconds:.0f} s, "
            f"{', '.join(f'{part} {f.cost.share(part):.0%}' for part in PARTS)}"
            for f in figures
        )
        caption = "Seconds of training by part; the rest is rewards, reference and log-probs of the old policy."
        return _plot(figure, "Cost", caption, told)


def _draw_band(
    axes: Axes, steps: list[int], seeds: np.ndarray, style: _Style, *, has_markers: bool
) -> None:
    axes.fill_between(
        steps, seeds.min(axis=0), seeds.max(axis=0), color=style.colour, alpha=0.15, linewidth=0
    )
    marks = {
        "marker": style.marker,
        "markevery": 1 if has_markers else max(1, len(steps) // 6),
        "markersize": 5,
    }
    axes.plot(
        steps, seeds.mean(axis=0), color=style.colour, linestyle=style.line, linewidth=1.8, **marks
    )


def _by_step(values: Sequence[dict[int, float]]) -> tuple[list[int], np.ndarray]:
    """The steps that all seeds have, and the values `[seed, step]` there."""
    steps = sorted(set.intersection(*map(set, values)))
    return steps, np.array([[run[step] for step in steps] for run in values])


def _short(name: str, length: int = 42) -> str:
    """A method's name as a label; matplotlib would read dollar signs as formulas."""
    label = " ".join(printable(name).split())
    return (
        label if len(label) <= length else f"{label[: length // 2]}…{label[-length // 2 :]}"
    ).replace("$", r"\$")


def _plot(figure: Figure, title: str, caption: str, told: str) -> Plot:
    """`told`: what can be read from the picture, for those who do not see it."""
    return Plot(
        title,
        caption,
        _svg(figure, title, f"{caption or title + '.'} {told}."),
        figure.get_figwidth() > 6,
    )


def _svg(figure: Figure, title: str, alternative: str) -> str:
    """The figure as an SVG element without a size of its own; ids stay where something refers to
    them."""
    picture = StringIO()
    with matplotlib.rc_context({"svg.hashsalt": title}):
        figure.savefig(
            picture,
            format="svg",
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    svg = picture.getvalue()
    head, rest = svg[svg.index("<svg") :].split(">", 1)
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    rest = re.sub(r' id="[A-Za-z0-9]+(?:_\d+)+"', "", rest)
    for placeholder, variable in (
        (_INK, "var(--ink)"),
        (_MUTED, "var(--muted)"),
        (_BLUE, "var(--blue)"),
    ):
        rest = rest.replace(placeholder, variable)
    return f'{head} role="img" aria-label="{escape(printable(alternative))}"><title>{escape(title)}</title>{rest}'
