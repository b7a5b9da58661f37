"""What follows a run while it trains."""

from collections.abc import Iterable

from rlad.engines.base import StepResult
from rlad.runs.directory import EvaluationSet
from rlad.runs.guards import GuardWarning
from rlad.runs.statistics import Estimate


class Reporter:
    """The base of what follows a run, such as the progress bar; by itself it is silent."""

    def phase(self, name: str) -> None:
        """The run begins another kind of work."""

    def notes(self, texts: Iterable[str]) -> None:
        """What the reader may not expect of this run."""

    def begins(self, step: int, num_steps: int) -> None:
        """The run is about to continue after `step`."""

    def works(self) -> None:
        """A small piece of work is about to be done, of which a step has many."""

    def step(self, result: StepResult, num_steps: int) -> None:
        """An optimiser step was made and recorded."""

    def evaluated(self, name: EvaluationSet, step: int, estimate: Estimate) -> None:
        """The student was evaluated after `step`, now or before an interruption."""

    def warned(self, warning: GuardWarning) -> None:
        """A guard found something."""
