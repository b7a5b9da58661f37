"""The plots of a report: SVG images in matplotlib's own style.

Methods differ in colour, line and marker.
"""

from base64 import b64encode
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import matplotlib
import matplotlib.style
import numpy as np
from matplotlib.figure import Figure

from rlad.comparison.figures import Method
from rlad.comparison.finished_runs import Run
from rlad.comparison.looks import Looks, looks_of
from rlad.runs.curve import STYLE, curve
from rlad.text import printable

SETTINGS: dict[str, Any] = {"svg.fonttype": "none", "svg.hashsalt": "rlad", "font.size": 9.5}
"""Text stays text, so that it can be searched, and the same runs give the same bytes."""


@dataclass(frozen=True, slots=True)
class Plot:
    """An SVG image, its caption, and in words what it shows that is in no table."""

    title: str
    caption: str
    told: str
    svg: bytes
    is_wide: bool

    @property
    def source(self) -> str:
        return f"data:image/svg+xml;base64,{b64encode(self.svg).decode()}"


def draw_plots(methods: Sequence[Method]) -> tuple[Plot, list[Plot]]:
    """Draw the results of a table, and the curves of its methods."""
    with matplotlib.style.context([*STYLE, SETTINGS]):
        looks = looks_of([m.name for m in methods])
        curves = [_draw_series(methods, looks, *row) for row in CURVES]
        return _draw_results(methods, looks), [plot for plot in curves if plot]


def _draw_results(methods: Sequence[Method], looks: Looks) -> Plot:
    """Draw test pass@1 of each method with its interval, its seeds and its start. This is also the
    legend of lines and markers for all plots."""
    figure = Figure(figsize=(8.5, 0.42 * len(methods) + 0.9), layout="constrained")
    axes = figure.subplots()
    for i, m in enumerate(methods):
        y = len(methods) - 1 - i
        bounds = [m.after.low, m.after.mean, m.after.high]
        axes.plot(bounds, [y] * 3, markevery=[1], markersize=9, **looks[m.name])
        # Each seed as a ring below the bar.
        seeds = [np.mean(values) for values in m.pass_by_seed.values()]
        axes.scatter(seeds, [y - 0.24] * len(seeds), s=16, facecolor="none", edgecolor="black")
        axes.plot(m.before.mean, y, marker="|", color="black", markersize=11)
    axes.set_yticks(range(len(methods)), [short_name(m.name) for m in reversed(methods)])
    axes.set(xlabel="test pass@1", ylim=(-0.6, len(methods) - 0.5))
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
    caption = (
        "Test pass@1. Marker and bar: mean after training, 95 % interval; rings: each seed; "
        "stroke: before training. Lines and markers are those of all plots."
    )
    return make_plot(figure, "Test pass@1", caption)


# --- curves ---------------------------------------------------------------------------------------

Series = Callable[[Run], dict[int, float]]
_TRAINED_TOKENS = (
    " Over the trained tokens, so not comparable between methods that train on different tokens: "
    "some leave out tokens without advantage (unless kl_coef > 0), others do not."
)
CURVES: Sequence[tuple[str, str, Series, str]] = (
    ("Reward", "mean reward of the rollouts", lambda run: run.by_step("reward/mean"), ""),
    ("Validation pass@1", "pass@1 on the validation split", lambda run: run.validation, ""),
    ("Completion length", "mean tokens of the rollouts", lambda run: run.completion_lengths, ""),
    (
        "Entropy",
        "nats, at the trained tokens",
        lambda run: run.by_step("student/entropy/mean"),
        _TRAINED_TOKENS,
    ),
)
"""Title, label, values of a run by step, note."""


def _draw_series(
    methods: Sequence[Method], looks: Looks, title: str, label: str, series: Series, note: str
) -> Plot | None:
    """Draw the mean over seeds, with a band from the lowest to the highest seed; None if no run has
    recorded it."""
    figure = Figure(figsize=(5.2, 3.1), layout="constrained")
    axes = figure.subplots()
    told = []
    absent = []
    for m in methods:
        values = [series(run) for run in m.runs]
        # Seeds that stopped early must not distort the mean, so use only steps that all have.
        steps = sorted(set.intersection(*map(set, values)))
        if not steps:
            absent.append(m.name)
            continue
        seeds = np.array([[run[step] for step in steps] for run in values])
        means = seeds.mean(axis=0)
        spacing = max(1, len(steps) // 6)
        curve(
            axes,
            steps,
            means,
            seeds.min(axis=0),
            seeds.max(axis=0),
            **looks[m.name],
            markevery=spacing,
        )
        told.append(
            f"{m.name} from {means[0]:.3g} at step {steps[0]} to {means[-1]:.3g} at step "
            f"{steps[-1]}"
        )
    if not told:
        return None
    axes.set(xlabel="step", ylabel=label)
    missing = f" Not recorded by {', '.join(absent)}." if absent else ""
    return make_plot(figure, title, f"{title} by step.{missing}{note}", "; ".join(told))


def short_name(name: str, length: int = 42) -> str:
    """Shorten a method's name to a label; matplotlib would read dollar signs as formulas."""
    label = " ".join(printable(name).split())
    if len(label) > length:
        label = f"{label[: length // 2]}…{label[-length // 2 :]}"
    return label.replace("$", r"\$")


def make_plot(figure: Figure, title: str, caption: str, told: str = "") -> Plot:
    picture = BytesIO()
    figure.savefig(picture, format="svg", transparent=True, metadata={"Date": None})
    return Plot(title, caption, told, picture.getvalue(), figure.get_figwidth() > 6)
