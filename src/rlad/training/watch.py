"""What a run does with the guards: says and records their warnings, keeps skipped batches, stops
after too many of them."""

import json
from typing import Protocol

from safetensors.torch import save

from rlad.config.run import RunConfig
from rlad.engines.base import StepResult
from rlad.engines.skipped_steps import SkippedBatch
from rlad.errors import RunFailedError
from rlad.runs.directory import METRICS, SKIPPED_BATCHES, WARNINGS, RunDirectory
from rlad.runs.guards import GuardWarning, Watch


class HearsWarnings(Protocol):
    def warned(self, warning: GuardWarning) -> None: ...


class RunWatch:
    """Watches one run; begins with the steps that its directory holds."""

    def __init__(self, config: RunConfig, run: RunDirectory, reporter: HearsWarnings):
        self.most = config.optimization.max_skipped_steps
        self.run, self.reporter, self.watch = run, reporter, Watch(config)
        for row in run.read(METRICS):
            self.watch.see(row)

    def after_step(self, result: StepResult, *, may_stop: bool) -> None:
        """To be told of each step once its metrics are recorded.

        Raises `RunFailedError` when `max_skipped_steps` steps in a row, or more, were skipped and
        the run `may_stop` here.
        """
        for warning in self.watch.see({"step": result.step, **result.metrics}):
            self.run.append(WARNINGS, warning.to_json())
            self.reporter.warned(warning)
        if result.skipped is None:
            return
        self._keep(result.step, result.skipped)
        if may_stop and (number := self.watch.skipped_in_a_row) >= self.most:
            raise RunFailedError(
                f"step {result.step}: loss or gradient was not finite in {number} steps in a row, "
                "which were skipped, and "
                f"optimization.max_skipped_steps allows {self.most}. The weights are as they were "
                "before; their batches are in "
                f"{self.run.path}/{SKIPPED_BATCHES}-*. Start a new run with a lower "
                "optimization.learning_rate or with "
                "objective.teacher_log_ratio_clip = 1.0, or go on with the next batch by --resume."
            )

    def _keep(self, step: int, batch: SkippedBatch) -> None:
        """Rollouts and scores of the last skipped batches, as many as may be skipped in a row."""
        name = f"{SKIPPED_BATCHES}-{step:06d}"
        self.run.write(
            f"{name}.jsonl", "".join(json.dumps(group.to_json()) + "\n" for group in batch.groups)
        )
        if batch.tensors:
            self.run.write(
                f"{name}.safetensors",
                save({key: value.contiguous() for key, value in batch.tensors.items()}),
            )
        for old in sorted(self.run.path.glob(f"{SKIPPED_BATCHES}-*.jsonl"))[: -self.most]:
            for file in (old, old.with_suffix(".safetensors")):
                self.run.delete(file.name)
