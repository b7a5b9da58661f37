"""What a person sees of a run on a terminal of 80 columns."""

from io import StringIO

from rich.console import Console

from rlad.engines.base import StepResult
from rlad.runs.statistics import Estimate
from rlad.training.console import ConsoleReporter


def test_no_figure_is_cut_off_however_long_the_line():
    shown = StringIO()
    console = Console(file=shown, force_terminal=True, color_system=None, width=80)
    metrics = {
        "reward/mean": 0.5,
        "reward/cannot_judge/frac": 0.12,
        "objective/gated_positive/frac": 0.101,
        "objective/gated_negative/frac": 0.102,
    }
    with ConsoleReporter(console) as reporter:
        reporter.evaluated("validation", 1000, Estimate(1.0, 0.9, 1.0))
        reporter.step(StepResult(1001, metrics, groups=()), num_steps=2000)
    assert (
        "reward 0.50 could not be judged 12% held-out pass@1 100.0% (step 1000) "
        "gated +10.1% -10.2%" in " ".join(shown.getvalue().split())
    )
