"""The interface of all engines. An engine makes optimiser steps on a student, reports each step,
and can be saved between steps."""

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
    """The batch of a skipped step, for finding the reason."""

    groups: Sequence[RolloutGroup]
    """groups of the whole rollout batch"""
    tensors: Mapping[str, Tensor]
    """scores of its rollouts by name, concatenated; empty if the engine keeps none"""


@dataclass(frozen=True, slots=True)
class StepResult:
    """One optimiser step: its number (from 1), its metrics and its groups."""

    step: int
    metrics: Metrics
    groups: Sequence[RolloutGroup]
    imitation: Mapping[int, Any] | None = None
    """for the first group: rollout -> what the step did with each of its tokens
    (`rlad.engines.imitation`)"""
    skipped: SkippedBatch | None = None
    """the batch, if the step was skipped because its loss or gradient was not finite"""
    skills: Mapping[str, Any] | None = None
    """for the first step on a batch: the skills that its teacher was shown, and the skills learnt
    from it"""


ResumePoint = Literal["step", "rollouts"]
"""Between two steps; or with the rollouts of the next step, before the first step on them."""


class Engine(Protocol):
    """The trainer of a student, step by step."""

    step: int
    """optimiser steps made so far"""

    flat_step: int | None
    """the step after which the objective changes, decided by validations and set by the run"""

    student: LanguageModel

    sampler: Sampler
    """samples the student's completions"""

    @property
    def resume_point(self) -> ResumePoint | None:
        """Return the kind of the present moment, if a run can be resumed from it; otherwise
        None."""
        ...

    is_main: bool
    """whether this process evaluates, records and decides; exactly one process does"""

    def run(
        self,
        after_step: Callable[[StepResult], bool],
        begin: Callable[[], bool] = lambda: True,
    ) -> None:
        """Make optimiser steps until the run's last one, or until `after_step`, which gets each
        step, returns False. `begin` is called before the first step, when all is ready; it returns
        False if no step is to be made."""
        ...

    def follow(self) -> None:
        """In any process but the main one: carry out the main process's orders until it ends."""
        ...

    def close(self) -> None:
        """Release the teacher's connections and files."""
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
    """Return this process's peak memory in bytes: on the student's GPU, or otherwise resident in
    main memory."""
    if student.model.device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(student.model.device))
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
