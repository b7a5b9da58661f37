"""The learning curve of a run as a picture, from its run directory."""

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rlad.run_dir import EVAL, METRICS, RunDirectory

# Okabe and Ito's palette: told apart by colour-blind readers, and by lightness in print.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#E69F00", "#009E73", "#666666"


def draw_curve(run: RunDirectory) -> Path:
    """Write `curve.png`: held-out pass@1 with its interval and training reward, gated shares, and completion length."""
    steps = list(run.read(METRICS))
    validation = [row for row in run.read(EVAL) if row["split"] == "validation"]
    tests = [row for row in run.read(EVAL) if row["split"] == "test"]
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    passed, gated, length = figure.subplots(1, 3)
    x = [row["step"] for row in steps]

    passed.plot(x, [row["reward/correct/frac"] for row in steps], color=GREY, linewidth=0.8, label="training, sampled")
    means = [row["pass@1"]["mean"] for row in validation]
    bars = [[row["pass@1"]["mean"] - row["pass@1"]["low"] for row in validation]]
    bars.append([row["pass@1"]["high"] - row["pass@1"]["mean"] for row in validation])
    passed.errorbar(
        [row["step"] for row in validation], means, yerr=bars, color=BLUE, marker="o", capsize=3, label="validation (95 %)"
    )
    passed.plot(
        [row["step"] for row in tests],
        [row["pass@1"]["mean"] for row in tests],
        color=ORANGE,
        marker="D",
        linestyle="none",
        label="test",
    )
    passed.set(title="pass@1", xlabel="step", ylim=(0, 1))
    passed.legend(loc="lower right")

    for key, colour, label in (
        ("objective/gated_positive/frac", BLUE, "of tokens with advantage > 0"),
        ("objective/gated_negative/frac", ORANGE, "of tokens with advantage < 0"),
        ("objective/clamped/frac", GREEN, "clamped, of all tokens"),
    ):
        points = [(row["step"], row[key]) for row in steps if key in row]
        if points:
            gated.plot(*zip(*points, strict=True), color=colour, label=label)
    gated.set(title="gated share of the update", xlabel="step")
    gated.set_ylim(bottom=0)
    gated.legend()

    length.plot(x, [row["rollout/completion_tokens/mean"] for row in steps], color=BLUE)
    length.set(title="mean completion length (tokens)", xlabel="step")
    length.set_ylim(bottom=0)
    path = run.path / "curve.png"
    figure.savefig(path, dpi=120)
    return path
