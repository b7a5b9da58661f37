"""The learning curve of a run as a picture, from its run directory."""

from base64 import b64encode
from collections.abc import Mapping
from html import escape
from io import BytesIO
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rlad.runs.directory import EVAL, METRICS, RunDirectory

# Okabe and Ito's palette: told apart by colour-blind readers, and by lightness in print.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#E69F00", "#009E73", "#666666"
_SHARES = (
    ("objective/gated_positive/frac", BLUE, "gated, of tokens with advantage > 0"),
    ("objective/gated_negative/frac", ORANGE, "gated, of tokens with advantage < 0"),
    ("objective/clamped/frac", GREEN, "clamped, of all tokens"),
)
CURVE = "curve.png"
"""its file in the run directory"""
Rows = list[dict[str, Any]]


def draw_curve(run: RunDirectory) -> bytes:
    """The picture as PNG: pass@1 on held-out and training problems, gated shares, and completion
    length, by step."""
    steps, evaluations = list(run.read(METRICS)), list(run.read(EVAL))
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    passed, shares, length = figure.subplots(1, 3)
    _draw_passed(passed, steps, evaluations)
    _draw_shares(shares, steps)
    _plot(length, steps, "rollout/completion_tokens/mean", color=BLUE)
    length.set(title="mean completion length (tokens)", xlabel="step")
    length.set_ylim(bottom=0)
    picture = BytesIO()
    figure.savefig(picture, dpi=120, format="png")
    return picture.getvalue()


def curve_html(run: RunDirectory, figures: Mapping[str, object]) -> str:
    """Named figures and, if it has been drawn, the learning curve of a run: what a notebook
    shows."""
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{escape(str(value))}</td></tr>"
        for name, value in figures.items()
    )
    picture = run.path / CURVE
    source = b64encode(picture.read_bytes()).decode() if picture.is_file() else ""
    return f"<table>{rows}</table>" + (
        f'<img alt="learning curve" src="data:image/png;base64,{source}">' if source else ""
    )


def _draw_passed(axes: Axes, steps: Rows, evaluations: Rows) -> None:
    _plot(axes, steps, "reward/correct/frac", color=GREY, linewidth=0.8, label="training, sampled")
    for split, colour, marker, line in (
        ("validation", BLUE, "o", "-"),
        ("test", ORANGE, "D", "none"),
    ):
        rows = [row for row in evaluations if row["split"] == split]
        figures = [row["pass@1"] for row in rows]
        bars = [[f["mean"] - f["low"] for f in figures], [f["high"] - f["mean"] for f in figures]]
        style = {
            "color": colour,
            "marker": marker,
            "linestyle": line,
            "capsize": 3,
            "label": f"{split} (95 %)",
        }
        axes.errorbar(
            [row["step"] for row in rows], [f["mean"] for f in figures], yerr=bars, **style
        )
    axes.set(title="pass@1", xlabel="step", ylim=(0, 1))
    axes.legend()


def _draw_shares(axes: Axes, steps: Rows) -> None:
    for key, colour, label in _SHARES:
        _plot(axes, steps, key, color=colour, label=label)
    axes.set(title="gated and clamped shares", xlabel="step")
    axes.set_ylim(bottom=0)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()


def _plot(axes: Axes, steps: Rows, key: str, **style: Any) -> None:
    """A metric by step, where it was recorded: no method has all of them."""
    points = [(row["step"], row[key]) for row in steps if key in row]
    if points:
        axes.plot(*zip(*points, strict=True), **style)
