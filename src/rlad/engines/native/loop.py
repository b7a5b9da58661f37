"""The loop for one device: rollout batches (`batches.py`), and the optimiser steps on each.

Random streams are named by seed and step, and problems are addressed by index. So the state of a
run is its step, its weights, its optimiser and, between the mini-batches of a rollout batch, that
batch.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from transformers import get_scheduler

from rlad.config.run import RunConfig
from rlad.engines.base import ResumePoint, SkippedBatch, StepResult, peak_memory
from rlad.engines.imitation import ImitationMap
from rlad.engines.metrics import TokenStats, ranking_metrics, rollout_metrics
from rlad.engines.native.batches import RolloutMaker
from rlad.engines.native.checkpoint import EngineState, batch_tensors, load_state, save_state
from rlad.engines.native.gradient import LossGradient, trained_parameters
from rlad.engines.rollout_batch import RolloutBatch
from rlad.errors import RunFailedError, UserError
from rlad.models.adapters import has_adapter
from rlad.models.loading import LanguageModel, save_model
from rlad.rollouts.grading import Timer
from rlad.rollouts.types import Metrics
from rlad.scoring.training_mode import require_same_gradients
from rlad.seeds import stream_seed
from rlad.tasks import Task
from rlad.teachers.base import Teacher

SKIPPED = "optimization/skipped/count"
# Nats per token; the guards of `sampler/mismatch/mean` already warn of smaller values.
LARGEST_MISMATCH = {"float32": 1e-3, "bfloat16": 0.5}
SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


class NativeEngine(RolloutMaker):
    """The engine that trains one student on one device."""

    is_main = True

    def __init__(
        self,
        config: RunConfig,
        *,
        student: LanguageModel,
        task: Task,
        teacher: Teacher | None = None,
        reference: LanguageModel | None = None,
        before_work: Callable[[], None] = lambda: None,
    ):
        """Take the arguments of `RolloutMaker`."""
        loop = config.optimization
        self.parameters = trained_parameters(student)
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=loop.learning_rate,
            betas=loop.betas,
            weight_decay=loop.weight_decay,
            fused=True,
        )
        self.scheduler = get_scheduler(
            SCHEDULES[loop.schedule],
            self.optimizer,
            num_warmup_steps=loop.warmup_steps,
            num_training_steps=loop.num_steps,
        )
        self.pending: RolloutBatch | None = None
        self._is_compared = False
        if config.student.gradient_checkpointing:
            student.model.gradient_checkpointing_enable()
            if has_adapter(student.model):
                require_same_gradients(student)
        # Samplers are started last, so that an earlier error leaves none of them running.
        super().__init__(
            config,
            student=student,
            task=task,
            teacher=teacher,
            reference=reference,
            before_work=before_work,
        )

    def steps(self) -> Iterator[StepResult]:
        """Yield optimiser steps until `num_steps`; between two steps the state may be saved."""
        per_batch = self.config.optimization.steps_per_rollout_batch
        while self.step < self.config.optimization.num_steps:
            if self.pending is None:
                self.pending = self.make_rollout_batch(self.step // per_batch)
                self.before_work()
            # Needed if the batch was restored, or no server could sample ahead.
            self.begin_ahead(self.pending.index + 1, Timer())
            # A rollout batch is used for `per_batch` steps, each on other prompts. Metrics of the
            # whole batch are reported with the first of them.
            batch = self.pending
            part = self.step % per_batch
            started = time.monotonic()
            prompts = self.minibatch(batch.index, part)
            imitation = ImitationMap(prompts[0] * batch.group_size, batch.group_size)
            metrics = self.update(batch, prompts, imitation)
            metrics |= {
                "time/update/seconds": time.monotonic() - started,
                "memory/peak/bytes": peak_memory(self.student),
            }
            metrics |= batch.seconds | batch.counts if part == 0 else {}
            if (objective := self.objective_at(batch.index)) is not self.config.objective:
                metrics["objective/teacher_phase/frac"] = float(objective.needs_teacher)
            is_skipped = bool(metrics[SKIPPED])
            self.step += 1
            if part == per_batch - 1:
                self.pending = None
                if self.teacher is not None:
                    self.teacher.after_batch(batch.index, is_skipped=is_skipped and per_batch == 1)
            yield StepResult(
                self.step,
                metrics,
                [batch.groups[i] for i in prompts],
                {} if is_skipped else imitation.of_rollout,
                SkippedBatch(batch.groups, batch_tensors(batch)) if is_skipped else None,
                batch.skills if part == 0 else None,
            )

    def run(
        self,
        after_step: Callable[[StepResult], bool],
        begin: Callable[[], bool] = lambda: True,
    ) -> None:
        """Make optimiser steps until `num_steps`, or until `after_step` returns False."""
        if not begin():
            return
        for result in self.steps():
            if not after_step(result):
                break

    @property
    def resume_point(self) -> ResumePoint:
        is_new = (
            self.pending is not None
            and self.step % self.config.optimization.steps_per_rollout_batch == 0
        )
        return "rollouts" if is_new else "step"

    def save(self, folder: Path, *, run_digest: str) -> None:
        save_model(self.student, folder)
        state = EngineState(
            step=self.step,
            scheduler=self.scheduler.state_dict(),
            moments=self.optimizer.state_dict()["state"],
            teacher_identity=self._teacher_identity,
            teacher=self.teacher.state() if self.teacher else {},
            skills=[] if self.skills is None else self.skills.to_json(),
            pending=self.pending,
        )
        save_state(state, folder, run_digest=run_digest)

    def restore(self, folder: Path, *, run_digest: str) -> None:
        problem_of = partial(self.task.problem, "train", seed=self.config.seed)
        state = load_state(folder, run_digest=run_digest, problem_of=problem_of)
        if state.teacher_identity != self._teacher_identity:
            raise UserError(
                f"it was trained with teacher {state.teacher_identity!r}, not "
                f"{self._teacher_identity!r}."
            )
        if self.teacher is not None:
            self.teacher.load_state(state.teacher)
        if self.skills is not None:
            self.skills.load(state.skills)
        # Nothing random is restored: seeds and problems follow from the step's number.
        self.step = state.step
        self.scheduler.load_state_dict(state.scheduler)
        # The optimiser of a new engine has the first learning rate of the schedule.
        groups = self.optimizer.state_dict()["param_groups"]
        for group, learning_rate in zip(groups, self.scheduler.get_last_lr(), strict=True):
            group["lr"] = learning_rate
        self.optimizer.load_state_dict({"state": state.moments, "param_groups": groups})
        # The choice of what trains follows from verdicts and advantages, so it is not stored.
        self.pending = state.pending
        if self.pending is not None:
            self.choose_what_trains(self.pending)

    @property
    def _teacher_identity(self) -> str | None:
        return None if self.teacher is None else self.teacher.identity

    def follow(self) -> None:
        """Do nothing: there is no other process."""

    # --- update -----------------------------------------------------------------------------------

    def minibatch(self, index: int, part: int) -> list[int]:
        """Return one optimiser step's prompts: an equal share of the batch, in a seeded order."""
        num_prompts = self.config.rollout.prompts_per_batch
        size = num_prompts // self.config.optimization.steps_per_rollout_batch
        seed = stream_seed(self.config.seed, "minibatches", index)
        order = torch.randperm(num_prompts, generator=torch.Generator().manual_seed(seed)).tolist()
        return sorted(order[part * size : (part + 1) * size])

    def update(
        self, batch: RolloutBatch, prompts: Sequence[int], imitation: ImitationMap | None = None
    ) -> Metrics:
        """Make one optimiser step on the groups `prompts` of a batch; return its metrics.

        If loss or gradient is not finite, the step is skipped: weights, moments and teacher do not
        change. The learning rate still advances, since it is a function of the step's number.
        """
        size = batch.group_size
        stats = TokenStats()
        wanted = [i for p in prompts for i in range(p * size, (p + 1) * size)]
        loss = self.accumulate_gradient(batch, wanted, stats, imitation)
        norm = float(
            torch.nn.utils.clip_grad_norm_(self.parameters, self.config.optimization.max_grad_norm)
        )
        groups = [batch.groups[i] for i in prompts]
        metrics = rollout_metrics(groups) | stats.summary()
        if stats.teacher_logprobs and math.isfinite(loss):  # otherwise not all were compared
            nothing = torch.empty(0)
            scored = [stats.teacher_logprobs.get(i, nothing) for i in wanted]
            metrics |= ranking_metrics(groups, scored)
        self._require_same_logprobs(metrics)
        if self.teacher is not None:  # it may have been asked within the update
            metrics |= self.teacher.pop_metrics()
        metrics |= {
            "optimization/loss": loss,
            "optimization/gradient_norm": norm,
            "optimization/learning_rate": float(self.scheduler.get_last_lr()[0]),
            SKIPPED: 0.0,
        }
        is_skipped = not (math.isfinite(loss) and math.isfinite(norm))
        if is_skipped:
            # Without gradients the optimiser does not change weights and moments; zero gradients
            # would, through the momentum.
            for parameter in self.parameters:
                parameter.grad = None
            finite = {key: value for key, value in metrics.items() if math.isfinite(value)}
            metrics = finite | {SKIPPED: 1.0}
        self.optimizer.step()
        self.scheduler.step()
        self.sampler.weights_changed()
        if self.teacher is not None and not is_skipped:
            self.teacher.after_step()
        return metrics

    def _require_same_logprobs(self, metrics: Metrics) -> None:
        """Raise `RunFailedError` if our own sampler and the scorer disagree about the tokens of the
        first batch: such a model would be trained on wrong log-probs."""
        mismatch = metrics.get("sampler/mismatch/mean")
        if mismatch is None or self._is_compared or not self.sampler.is_trainers_own:
            return
        self._is_compared = True
        limit = LARGEST_MISMATCH[self.config.student.dtype]
        if mismatch > limit:
            raise RunFailedError(
                f"step {self.step + 1}: sampling token by token and scoring whole completions give "
                f"log-probs of {self.student.name!r} that differ by {mismatch:.2g} nats per token "
                f"(sampler/mismatch/mean, at most {limit:g}); this model cannot be trained with "
                "rlad's own sampler: use another model, or rollout.engine = 'vllm'."
            )

    def accumulate_gradient(
        self,
        batch: RolloutBatch,
        wanted: Sequence[int],
        stats: TokenStats,
        imitation: ImitationMap | None = None,
    ) -> float:
        """Set the gradient of the loss over the rollouts `wanted`; return the loss."""
        return LossGradient(
            self.config,
            self.objective_at(batch.index),
            step=self.step,
            scorer=self.scorer,
            teacher=self.teacher,
            correction=None if self.sampler.is_trainers_own else self.config.rollout.correction,
            before_work=self.before_work,
        ).accumulate(batch, wanted, stats, imitation)
