"""Who is told what happens in a run."""

from typing import Protocol

from rlad.engines.base import StepResult
from rlad.runs.directory import EvaluationSet
from rlad.runs.guards import GuardWarning
from rlad.runs.statistics import Estimate


class Reporter(Protocol):
    """Is told what happens in a run; the console's progress bar is one."""

    def phase(self, name: str) -> None: ...
    def step(self, result: StepResult, num_steps: int) -> None: ...
    def evaluated(self, name: EvaluationSet, step: int, estimate: Estimate) -> None: ...
    def warned(self, warning: GuardWarning) -> None: ...


class Silent:
    """A reporter that says nothing."""

    def phase(self, name: str) -> None:
        pass

    def step(self, result: StepResult, num_steps: int) -> None:
        pass

    def evaluated(self, name: EvaluationSet, step: int, estimate: Estimate) -> None:
        pass

    def warned(self, warning: GuardWarning) -> None:
        pass
