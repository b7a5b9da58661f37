"""The learning curve of a run as a picture, and the function that draws all curves."""

from base64 import b64encode
from collections.abc import Mapping, Sequence
from html import escape
from io import BytesIO
from typing import Any, Literal

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rlad.runs.directory import RunDirectory
from rlad.runs.rows import History, read_history

STYLE = ("seaborn-v0_8-whitegrid", "tableau-colorblind10")
"""The matplotlib style sheets of all plots."""
CURVE = "curve.png"
"""The file of the learning curve in the run directory."""
Values = Sequence[float]


def curve(
    axes: Axes,
    x: Values,
    y: Values,
    low: Values | None = None,
    high: Values | None = None,
    **look: Any,
) -> None:
    """Draw a line, with a band from `low` to `high` around it."""
    (line,) = axes.plot(x, y, **look)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if low is not None and high is not None:
        axes.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)


def draw_curve(run: RunDirectory, form: Literal["png", "svg"] = "png") -> bytes:
    """Draw pass@1 on held-out and training problems, gated shares and completion length by step,
    as a picture."""
    history = read_history(run)
    with matplotlib.style.context(list(STYLE)):
        figure = Figure(figsize=(11, 3.6), layout="constrained")
        passed, shares, length = figure.subplots(1, 3)
        _draw_passed(passed, history)
        _draw_metric(shares, history, "objective/gated_positive/frac", label="gated, advantage > 0")
        _draw_metric(shares, history, "objective/gated_negative/frac", label="gated, advantage < 0")
        _draw_metric(shares, history, "objective/clamped/frac", label="clamped, of all tokens")
        shares.set(title="gated and clamped shares of tokens", xlabel="step", ylim=(0, None))
        if shares.lines:
            shares.legend()
        _draw_metric(length, history, "rollout/completion_tokens/mean")
        length.set(title="mean completion length (tokens)", xlabel="step", ylim=(0, None))
        picture = BytesIO()
        figure.savefig(picture, dpi=120, format=form)
    return picture.getvalue()


def curve_html(run: RunDirectory, figures: Mapping[str, object]) -> str:
    """Show named figures and, if it has been drawn, the learning curve of a run, for a notebook."""
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{escape(str(value))}</td></tr>"
        for name, value in figures.items()
    )
    html = f"<table>{rows}</table>"
    picture = run.path / CURVE
    if picture.is_file():
        source = b64encode(picture.read_bytes()).decode()
        html += f'<img alt="learning curve" src="data:image/png;base64,{source}">'
    return html


def _draw_passed(axes: Axes, history: History) -> None:
    key = "reward/correct/frac"
    _draw_metric(axes, history, key, label="training, sampled", color="grey", linewidth=0.8)
    for split, look in (("validation", "o-"), ("test", "D")):
        rows = [row for row in history.evaluations if row.split == split]
        found = [row.pass_at_1 for row in rows]
        errors = [[e.mean - e.low for e in found], [e.high - e.mean for e in found]]
        steps = [row.step for row in rows]
        means = [e.mean for e in found]
        axes.errorbar(steps, means, yerr=errors, fmt=look, capsize=3, label=f"{split} (95 %)")
    axes.set(title="pass@1", xlabel="step", ylim=(0, 1))
    axes.legend()


def _draw_metric(axes: Axes, history: History, key: str, **look: Any) -> None:
    """Draw a metric by step, if it was recorded: no method has all metrics."""
    rows = [row for row in history.steps if key in row]
    if rows:
        curve(axes, [row["step"] for row in rows], [row[key] for row in rows], **look)
