"""What every engine offers: it makes optimiser steps on a student, reports each, and can be saved
between two of them."""

import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from rlad.models.loading import LanguageModel
from rlad.rollouts.types import Metrics, RolloutGroup, Sampler


@dataclass(frozen=True, slots=True)
class SkippedBatch:
    """What a skipped step was made on, for whoever looks for the reason."""

    groups: Sequence[RolloutGroup]
    """of the whole rollout batch"""
    tensors: Mapping[str, Tensor]
    """scores of its rollouts by name, one after the other; empty where the engine keeps none"""


@dataclass(frozen=True, slots=True)
class StepResult:
    """One optimiser step: its number (from 1), its metrics and the groups it was made on."""

    step: int
    metrics: Metrics
    groups: Sequence[RolloutGroup]
    imitation: Mapping[int, Any] | None = None
    """of the first group: rollout -> what the step did with each of its tokens
    (`rlad.engines.imitation`)"""
    skipped: SkippedBatch | None = None
    """the batch of a step that was skipped, since its loss or gradient was not finite"""
    skills: Mapping[str, Any] | None = None
    """of a batch on which this is the first step: what its teacher was shown of earlier episodes,
    and what it has taught"""


ResumePoint = Literal["step", "rollouts"]
"""between two steps; or with the rollouts of the next step, on which none has been made yet"""


class Engine(Protocol):
    """What trains a student, step by step."""

    step: int
    """optimiser steps made so far"""

    flat_step: int | None
    """the step after which the objective changes, decided by the validations; set by the run"""

    student: LanguageModel

    sampler: Sampler
    """what writes the student's completions"""

    @property
    def resume_point(self) -> ResumePoint | None:
        """What kind of moment the present one is, if a run can be resumed from it; else None."""
        ...

    is_main: bool
    """whether this process evaluates, records and decides; of several one does"""

    def run(
        self,
        after_step: Callable[[StepResult], bool],
        begin: Callable[[], bool] = lambda: True,
    ) -> None:
        """Make optimiser steps until the run's last one, or until `after_step`, which gets each of
        them, returns False. `begin` is called when all is ready for the first; it returns False
        where there is none to be made."""
        ...

    def follow(self) -> None:
        """In a process that is not the main one, do what that asks for, until it ends."""
        ...

    def close(self) -> None:
        """Release what the teacher holds: connections and files."""
        ...

    def save(self, folder: Path, *, run_digest: str) -> None:
        """Write everything that `restore` needs into `folder`, a Hugging Face model folder;
        `run_digest` names the run."""
        ...

    def restore(self, folder: Path, *, run_digest: str) -> None:
        """Bring a new engine, whose student was loaded from `folder`, to the state saved there.

        Raises `UserError` if it cannot.
        """
        ...


def peak_memory(student: LanguageModel) -> float:
    """Measure the most bytes that this process has held so far: on the student's GPU, or else
    resident in main memory."""
    if student.model.device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(student.model.device))
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
