"""The display of a run: a progress bar on a terminal and in a notebook, plain lines in a pipe."""

import time
from collections.abc import Iterable
from importlib.util import find_spec
from typing import Self

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from rlad.engines.base import StepResult
from rlad.runs.directory import EvaluationSet
from rlad.runs.guards import GuardWarning
from rlad.runs.statistics import Estimate
from rlad.text import printable
from rlad.training.reporter import Reporter


class _TwoLines(Progress):
    """The progress bar with its times, and the run's figures below it."""

    figures = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        yield Text(self.figures)


class ConsoleReporter(Reporter):
    """A reporter that shows a run while it trains. Use it as a context manager."""

    def __init__(self, console: Console):
        self._console = console
        self._in_notebook = console.is_jupyter and find_spec("ipywidgets") is not None
        self._is_live = console.is_terminal or self._in_notebook
        self._progress = _TwoLines(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("left,"),
            TimeElapsedColumn(),
            TextColumn("so far"),
            console=console,
            disable=not self._is_live,
            # From another thread it would take our lines into its widget.
            auto_refresh=not self._in_notebook,
            speed_estimate_period=3600.0,
        )
        self._task = self._progress.add_task("starting", total=None)
        self._steps = 0
        self._pieces = 0
        """Pieces of work since the last step; the next line has those of the step before."""
        self._pieces_of_a_step = 0
        self._moved = 0.0
        self._validation = ""
        self._num_tokens = 0.0
        self._seconds = 0.0
        self._last_line = 0.0

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def phase(self, name: str) -> None:
        self._progress.update(self._task, description=name, refresh=self._in_notebook)

    def begins(self, step: int, num_steps: int) -> None:
        self._steps = step
        self._progress.update(self._task, total=num_steps, completed=step)

    def works(self) -> None:
        self._pieces += 1
        # Most steps have about as many pieces of work as the one before.
        now = time.monotonic()
        if self._is_live and self._pieces_of_a_step and now - self._moved > 0.2:
            self._moved = now
            share = min(self._pieces / self._pieces_of_a_step, 0.99)
            self._progress.update(self._task, completed=self._steps + share)

    def step(self, result: StepResult, num_steps: int) -> None:
        self._steps = result.step
        self._pieces_of_a_step = self._pieces
        self._pieces = 0
        figures = "  ".join(part for part in self._figures(result) if part)
        self._progress.figures = figures
        self._progress.update(
            self._task, total=num_steps, completed=result.step, refresh=self._in_notebook
        )
        is_due = time.monotonic() - self._last_line > 10 or result.step == num_steps
        if is_due and not self._is_live:
            self._print(f"step {result.step}/{num_steps}  {figures}")
            self._last_line = time.monotonic()

    def evaluated(self, name: EvaluationSet, step: int, estimate: Estimate) -> None:
        if name == "validation":
            self._validation = f"held-out pass@1 {estimate.mean:.1%} (step {step})"
        self._print(f"step {step}  {name} pass@1 {estimate}")

    def notes(self, texts: Iterable[str]) -> None:
        for text in texts:
            self._print(f"note  {text}")

    def warned(self, warning: GuardWarning) -> None:
        self._print(f"warning  step {warning.step}: {warning.message}")

    def _figures(self, result: StepResult) -> Iterable[str]:
        metrics = result.metrics
        if "reward/mean" in metrics:
            yield f"reward {metrics['reward/mean']:.2f}"
        elif "optimization/loss" in metrics:
            yield f"loss {metrics['optimization/loss']:.3f}"
        if metrics.get("reward/cannot_judge/frac"):
            yield f"could not be judged {metrics['reward/cannot_judge/frac']:.0%}"
        yield self._validation
        if "objective/gated_positive/frac" in metrics:
            positive = metrics["objective/gated_positive/frac"]
            negative = metrics["objective/gated_negative/frac"]
            yield f"gated +{positive:.1%} -{negative:.1%}"
        num_rollouts = sum(len(group.rollouts) for group in result.groups)
        self._num_tokens += metrics.get("rollout/completion_tokens/mean", 0.0) * num_rollouts
        self._seconds += sum(value for key, value in metrics.items() if key.startswith("time/"))
        if self._num_tokens and self._seconds:
            yield f"{self._num_tokens / self._seconds:,.0f} tokens/s"

    def _print(self, line: str) -> None:
        self._console.print(printable(line), highlight=False, markup=False, soft_wrap=True)
