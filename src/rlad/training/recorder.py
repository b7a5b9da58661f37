"""Write rows, samples, warnings and checkpoints while a run trains."""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from safetensors.torch import save
from transformers import PreTrainedTokenizerBase

from rlad.config.run import RunConfig
from rlad.engines.base import Engine, SkippedBatch, StepResult
from rlad.errors import RunFailedError
from rlad.runs.curve import CURVE, draw_curve
from rlad.runs.directory import (
    EVAL,
    METRICS,
    MODEL_CARD,
    SAMPLES,
    SKILLS,
    SKIPPED_BATCHES,
    WARNINGS,
    EvaluationSet,
    RunDirectory,
)
from rlad.runs.guards import Watch
from rlad.runs.model_card import model_card
from rlad.runs.rows import ProblemResult, pass_at_1
from rlad.runs.statistics import Estimate
from rlad.training.reporter import Reporter


class Recorder:
    """The recorder of a run. It writes to the run directory, then calls the reporters, and counts
    the budget that the run has used.

    A new recorder continues after the steps in the directory.
    """

    def __init__(
        self,
        config: RunConfig,
        run: RunDirectory,
        reporters: Sequence[Reporter],
        tokenizer: PreTrainedTokenizerBase,
    ):
        self.config = config
        self.run = run
        self.reporters = reporters
        self._decode = tokenizer.decode
        self._guards = Watch(config)
        self._saved_at = math.inf
        self._seconds = 0.0
        self._teacher_tokens = 0.0
        # Guards use many steps, so those of a resumed run read the earlier steps again.
        for row in run.read(METRICS):
            self._guards.see(row)
            self._use(row)

    @property
    def has_used_up_its_budget(self) -> bool:
        """Whether training has used up its seconds or its teacher tokens."""
        seconds = self.config.optimization.max_seconds or math.inf
        teacher_tokens = self.config.optimization.max_teacher_tokens or math.inf
        return self._seconds >= seconds or self._teacher_tokens >= teacher_tokens

    def _use(self, metrics: Mapping[str, float]) -> None:
        self._seconds += sum(value for key, value in metrics.items() if key.startswith("time/"))
        self._teacher_tokens += metrics.get("teacher/tokens/count", 0.0)

    def phase(self, name: str) -> None:
        for reporter in self.reporters:
            reporter.phase(name)

    def begins(self, step: int) -> None:
        for reporter in self.reporters:
            reporter.begins(step, self.config.optimization.num_steps)

    def works(self) -> None:
        for reporter in self.reporters:
            reporter.works()

    # --- steps ------------------------------------------------------------------------------------

    def step(self, result: StepResult, *, may_stop: bool) -> None:
        """Record one optimiser step.

        Raises `RunFailedError` if at least `max_skipped_steps` steps in a row were skipped and the
        run `may_stop` here.
        """
        self._use(result.metrics)
        self.run.append(METRICS, {"step": result.step, **result.metrics})
        if result.groups:
            self.run.append(SAMPLES, {"step": result.step} | self._sample(result))
        if result.skills is not None:
            self.run.append(SKILLS, {"step": result.step, **result.skills})
        for warning in self._guards.see({"step": result.step, **result.metrics}):
            self.run.append(WARNINGS, warning.to_json())
            for reporter in self.reporters:
                reporter.warned(warning)
        if result.skipped is not None:
            self._keep_skipped(result.step, result.skipped)
            most = self.config.optimization.max_skipped_steps
            number = self._guards.skipped_in_a_row
            if may_stop and number >= most:
                raise RunFailedError(
                    f"step {result.step}: loss or gradient was not finite in {number} steps in a "
                    "row, which were skipped, and optimization.max_skipped_steps allows "
                    f"{most}. The weights are as they were before; their batches are in "
                    f"{self.run.path}/{SKIPPED_BATCHES}-*. Start a new run with a lower "
                    "optimization.learning_rate or with objective.teacher_log_ratio_clip = 1.0, or "
                    "continue with the next batch by --resume."
                )
        for reporter in self.reporters:
            reporter.step(result, self.config.optimization.num_steps)

    def _sample(self, result: StepResult) -> dict[str, Any]:
        """Return the first group of a step with the text of each token, and what the update did
        with it."""
        row = result.groups[0].to_json()
        if pictures := result.groups[0].problem.images:
            row["pictures"] = [picture.data_url() for picture in pictures]
        for i, rollout in enumerate(row["rollouts"]):
            token_ids = rollout["completion"]["token_ids"]
            rollout["tokens"] = [self._decode([token]) for token in token_ids]
            rollout["imitation"] = (result.imitation or {}).get(i)
        return row

    def _keep_skipped(self, step: int, batch: SkippedBatch) -> None:
        """Store rollouts and scores of the last skipped batches, as many as may be skipped in a
        row."""
        name = f"{SKIPPED_BATCHES}-{step:06d}"
        rows = "".join(json.dumps(group.to_json()) + "\n" for group in batch.groups)
        self.run.write(f"{name}.jsonl", rows)
        if batch.tensors:
            tensors = {key: value.contiguous() for key, value in batch.tensors.items()}
            self.run.write(f"{name}.safetensors", save(tensors))
        kept = self.config.optimization.max_skipped_steps
        for old in sorted(self.run.path.glob(f"{SKIPPED_BATCHES}-*.jsonl"))[:-kept]:
            self.run.delete(old.name)
            self.run.delete(old.with_suffix(".safetensors").name)

    # --- evaluations ------------------------------------------------------------------------------

    def evaluation(
        self, name: EvaluationSet, step: int, evaluate: Callable[[], Sequence[ProblemResult]]
    ) -> Estimate:
        """Return pass@1 of an evaluation: the result recorded before an interruption, or otherwise
        that of `evaluate`, which is then recorded."""
        estimate = recorded_estimate(self.run, name, step)
        if estimate is None:
            self.phase(f"evaluating on {name} problems")
            results = evaluate()
            estimate = pass_at_1(results)
            rows = [result.to_json() for result in results]
            self.run.append(
                EVAL, {"step": step, "split": name, "pass@1": asdict(estimate), "results": rows}
            )
        for reporter in self.reporters:
            reporter.evaluated(name, step, estimate)
        return estimate

    def finish(self, before: Estimate, after: Estimate) -> None:
        """Write the learning curve and the model card, the last files of a run."""
        self.run.write(CURVE, draw_curve(self.run))
        self.run.write(MODEL_CARD, model_card(self.config, self.run, before, after))

    # --- checkpoints ------------------------------------------------------------------------------

    def save(self, engine: Engine) -> None:
        """Write a checkpoint of the current state, unless there is one."""
        step = engine.step
        digest = self.config.digest
        with_rollouts = engine.resume_point == "rollouts"
        path = self.run.checkpoint(step, with_rollouts=with_rollouts)
        if not path.is_dir():
            self.run.write_checkpoint(
                step,
                lambda folder: engine.save(folder, run_digest=digest),
                run_digest=digest,
                with_rollouts=with_rollouts,
            )
        self._saved_at = path.stat().st_mtime

    def save_if_due(self, engine: Engine) -> None:
        """Write a checkpoint if `checkpoints.every_seconds` have passed since the last one, but
        never before the first."""
        due = self._saved_at + self.config.checkpoints.every_seconds
        if time.time() > due and engine.resume_point is not None:
            self.save(engine)

    def prune(self) -> None:
        """Delete all checkpoints except the last and the best ones."""
        settings = self.config.checkpoints
        self.run.keep(last=settings.keep_last, best=settings.keep_best)


def recorded_estimate(run: RunDirectory, name: EvaluationSet, step: int) -> Estimate | None:
    """Return the pass@1 of an evaluation recorded in a run directory; None if there is none."""
    for row in run.read(EVAL):
        if row["split"] == name and row["step"] == step:
            return Estimate(**row["pass@1"])
    return None
