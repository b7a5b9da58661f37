"""The interface of what follows a run while it trains."""

from collections.abc import Iterable

from rlad.engines.base import StepResult
from rlad.runs.directory import EvaluationSet
from rlad.runs.guards import GuardWarning
from rlad.runs.statistics import Estimate


class Reporter:
    """The base of everything that follows a run, such as the progress bar. It does nothing."""

    def phase(self, name: str) -> None:
        """Handle the begin of another kind of work."""

    def notes(self, texts: Iterable[str]) -> None:
        """Show what a reader may not expect of this run."""

    def begins(self, step: int, num_steps: int) -> None:
        """Handle that the run starts, or continues, after `step`."""

    def works(self) -> None:
        """Handle the begin of one of the many small pieces of work of a step."""

    def step(self, result: StepResult, num_steps: int) -> None:
        """Handle an optimiser step that was made and recorded."""

    def evaluated(self, name: EvaluationSet, step: int, estimate: Estimate) -> None:
        """Handle an evaluation of the student after `step`, now or before an interruption."""

    def warned(self, warning: GuardWarning) -> None:
        """Handle a guard's warning."""
