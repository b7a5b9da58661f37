"""What a person sees: a progress bar on a terminal, plain lines in a pipe, and tables."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from rlad.engines.native import StepResult
from rlad.evaluate import Estimate
from rlad.tasks import Split

_PLAIN_EVERY_SECONDS = 10.0


def printable(text: str) -> str:
    """Text from a model or a file without control characters, so that it cannot steer the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


class ConsoleReporter:
    """Shows a run while it goes on. Use as a context manager."""

    def __init__(self, console: Console):
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("starting", total=None, figures="")
        self._validation = ""
        self._last_line = 0.0

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    def phase(self, name: str) -> None:
        self._progress.update(self._task, description=name)

    def step(self, result: StepResult, num_steps: int) -> None:
        metrics = result.metrics
        seconds = sum(v for k, v in metrics.items() if k.startswith("time/"))
        figures = [f"reward {metrics['reward/mean']:.2f}", self._validation]
        if "objective/gated_positive/frac" in metrics:
            positive, negative = metrics["objective/gated_positive/frac"], metrics["objective/gated_negative/frac"]
            figures.append(f"gated +{positive:.1%} -{negative:.1%}")
        num_tokens = metrics["rollout/completion_tokens/mean"] * sum(len(group.rollouts) for group in result.groups)
        figures.append(f"{num_tokens / seconds:,.0f} tokens/s")
        text = "  ".join(part for part in figures if part)
        self._progress.update(self._task, total=num_steps, completed=result.step, figures=text)
        now = time.monotonic()
        if not self._console.is_terminal and (now - self._last_line > _PLAIN_EVERY_SECONDS or result.step == num_steps):
            self._console.print(f"step {result.step}/{num_steps}  {text}", highlight=False)
            self._last_line = now

    def evaluated(self, split: Split, step: int, estimate: Estimate) -> None:
        if split == "validation":
            self._validation = f"held-out pass@1 {estimate.mean:.1%}"
        if not self._console.is_terminal:
            self._console.print(f"step {step}  {split} pass@1 {estimate}", highlight=False)
