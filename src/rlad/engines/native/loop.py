"""The loop for one device, top to bottom as the paper tells it: sample, reward, advantage, score,
objective, step.

Everything random comes from streams named by seed and step, and problems are addressed by index:
the state of a run is its step, its weights, its optimiser and, between the mini-batches of one
rollout batch, that batch.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import get_scheduler

from rlad.config.run import RunConfig
from rlad.engines.base import ResumePoint, StepResult, peak_memory
from rlad.engines.imitation import imitation_of
from rlad.engines.knobs import at_step, objective_knobs, taken_by
from rlad.engines.metrics import TokenStats, rollout_metrics
from rlad.engines.native.checkpoint import batch_tensors, restore_engine, save_engine
from rlad.engines.native.overlap import AskedAhead, asking_ahead
from rlad.engines.rollout_batch import (
    RolloutBatch,
    by_rollout,
    padded,
    score_rows,
    teacher_requests,
)
from rlad.engines.skipped_steps import (
    SKIPPED,
    SkippedBatch,
    drop_gradient,
    metrics_of_skipped,
    require_sound_weights,
)
from rlad.models.loading import LanguageModel
from rlad.objectives import OBJECTIVES, Objective, token_loss
from rlad.objectives.advantages import group_advantages
from rlad.objectives.aggregate import aggregate, denominator
from rlad.objectives.inputs import LossInputs
from rlad.rollouts.grading import roll_out, timed
from rlad.rollouts.types import Metrics, RolloutGroup
from rlad.scoring.scorer import CompletionScores, Scorer
from rlad.seeds import stream_seed
from rlad.tasks import Task, Verdict
from rlad.teachers.adapter import AdapterScorer
from rlad.teachers.asking import complete_logprobs
from rlad.teachers.base import Teacher

SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


class NativeEngine:
    """Trains one student on one device."""

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
        """`before_work` is called before every decoding step and micro-batch; it may raise to stop
        the run there.

        `reference` is the frozen initial student; needed when `kl_coef` is not 0. A LoRA student
        may be its own: its base weights are the initial student.
        """
        loop = config.optimization
        self.config, self.student, self.task, self.teacher = config, student, task, teacher
        self.before_work = before_work
        self.step = 0
        self.pending: RolloutBatch | None = None
        self.parameters = [
            parameter for parameter in student.model.parameters() if parameter.requires_grad
        ]
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
        scoring: dict[str, Any] = {
            "temperature": config.rollout.temperature,
            "tokens_per_batch": loop.tokens_per_batch,
        }
        scoring["before_work"] = before_work
        self.scorer = Scorer(student, **scoring)
        self.reference_scorer = None
        if reference is not None:
            shared = reference is student
            self.reference_scorer = (
                AdapterScorer(student, adapter=None, **scoring)
                if shared
                else Scorer(reference, **scoring)
            )
        if config.student.gradient_checkpointing:
            student.model.gradient_checkpointing_enable()

    def steps(self) -> Iterator[StepResult]:
        """Optimiser steps until `num_steps`; between two of them the engine's state may be
        saved."""
        per_batch = self.config.optimization.steps_per_rollout_batch
        while self.step < self.config.optimization.num_steps:
            if self.pending is None:
                self.pending = self.make_rollout_batch(self.step // per_batch)
                self.before_work()
            batch, part = self.pending, self.step % per_batch
            started = time.monotonic()
            prompts = self._minibatch(batch.index, part)
            metrics = self.update(batch, prompts)
            metrics |= {
                "time/update/seconds": time.monotonic() - started,
                "memory/peak/bytes": peak_memory(self.student),
            }
            metrics |= batch.seconds | batch.counts if part == 0 else {}
            self.step += 1
            if part == per_batch - 1:
                self.pending = None
            skipped = SkippedBatch(batch.groups, batch_tensors(batch)) if metrics[SKIPPED] else None
            yield StepResult(
                self.step, metrics, [batch.groups[i] for i in prompts], batch.imitation, skipped
            )

    def run(self, after_step: Callable[[StepResult], bool]) -> None:
        """Optimiser steps until `num_steps`, or until `after_step`, which is told of each, answers
        False."""
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
        save_engine(self, folder, run_digest=run_digest)

    def restore(self, folder: Path, *, run_digest: str) -> None:
        restore_engine(self, folder, run_digest=run_digest)

    def close(self) -> None:
        if self.teacher is not None:
            self.teacher.close()

    def objective_of(self, batch_index: int) -> Any:
        """The config of the objective that a rollout batch is for: of the run's, the one whose turn
        it is."""
        objective, loop = self.config.objective, self.config.optimization
        return objective.at_step(batch_index * loop.steps_per_rollout_batch, loop.num_steps)

    # --- rollouts -----------------------------------------------------------------------------------------------------

    def make_rollout_batch(self, index: int) -> RolloutBatch:
        """Sample, reward, advantage; then what the objective needs from teacher, reference and old
        policy."""
        size = self.config.rollout.prompts_per_batch
        objective = self.objective_of(index)
        row = OBJECTIVES[objective.type]
        seconds: Metrics = {}
        with asking_ahead(self.teacher if objective.needs_teacher else None, seconds) as ahead:
            groups = roll_out(
                self.config,
                self.task,
                range(index * size, (index + 1) * size),
                writer=self.student,
                student=self.student,
                seed=stream_seed(self.config.seed, "rollouts", index),
                seconds=seconds,
                before_work=self.before_work,
                after_group=partial(self._ask_ahead, ahead, index),
            )
            batch = self._with_advantages(index, groups, seconds)
            rows = self._rows_that_train(batch)
            if objective.needs_teacher:
                assert self.teacher is not None
                with timed(seconds, "time/teacher/seconds"):
                    batch.teacher_logprobs = by_rollout(
                        self._ask_teacher(batch, rows, ahead), batch, rows
                    )
                batch.counts |= {
                    "teacher/tokens/count": sum(map(len, batch.teacher_logprobs))
                } | self.teacher.pop_metrics()
        if self.reference_scorer is not None:
            with timed(seconds, "time/reference/seconds"):
                batch.reference_logprobs = score_rows(self.reference_scorer.score, batch, rows)
        if self.config.optimization.steps_per_rollout_batch > 1 or row.token_advantages:
            with timed(seconds, "time/old_logprobs/seconds"):
                batch.old_logprobs = score_rows(self.scorer.score, batch, rows)
        if row.token_advantages:
            batch.token_advantages = self._token_advantages(row, batch)
        return batch

    def _with_advantages(
        self, index: int, groups: list[RolloutGroup], seconds: Metrics
    ) -> RolloutBatch:
        rewards = torch.tensor(
            [r.reward for group in groups for r in group.rollouts], dtype=torch.float64
        )
        judged = torch.tensor(
            [r.verdict != Verdict.CANNOT_JUDGE for group in groups for r in group.rollouts]
        )
        scale, size = self.config.optimization.advantage_scale, self.config.rollout.group_size
        return RolloutBatch(
            index,
            groups,
            group_advantages(rewards, size, scale=scale, judged=judged),
            seconds=seconds,
        )

    def _ask_ahead(
        self, ahead: AskedAhead | None, index: int, number: int, group: RolloutGroup
    ) -> None:
        """Ask the teacher about a group of a batch, while others of it are still written."""
        if ahead is None:
            return
        with timed(ahead.seconds, "time/teacher/seconds"):
            batch, first = (
                self._with_advantages(index, [group], {}),
                number * self.config.rollout.group_size,
            )
            rows = self._rows_that_train(batch)
            ahead.ask(
                [first + i for i in rows],
                teacher_requests(batch, rows, self.task, seed=self.config.seed),
            )

    def _ask_teacher(
        self, batch: RolloutBatch, rows: Sequence[int], ahead: AskedAhead | None = None
    ) -> list[Tensor]:
        """The teacher's log-probs of some rollouts, which it may have been asked for ahead."""
        assert self.teacher is not None
        if ahead is None:
            requests = teacher_requests(batch, rows, self.task, seed=self.config.seed)
        else:
            requests = [ahead.requests[row] for row in rows]
        return complete_logprobs(
            self.teacher,
            requests,
            max_missing_share=self.config.optimization.max_missing_teacher_share,
            step=self.step + 1,
            answers=None if ahead is None else ahead.answers(rows),
        )

    def _token_advantages(self, row: Objective, batch: RolloutBatch) -> list[Tensor]:
        assert (
            batch.old_logprobs is not None
            and batch.teacher_logprobs is not None
            and row.token_advantages is not None
        )
        lengths = [len(completion) for completion in batch.completions]
        mask = pad_sequence(
            [torch.ones(length, dtype=torch.bool) for length in lengths], batch_first=True
        )
        advantages = row.token_advantages(
            old_logprobs=pad_sequence(batch.old_logprobs, batch_first=True),
            teacher_logprobs=pad_sequence(batch.teacher_logprobs, batch_first=True),
            mask=mask,
            group_size=self.config.rollout.group_size,
            **taken_by(
                row.token_advantages, objective_knobs(self.objective_of(batch.index), self.step)
            ),
        )
        return [values[:length] for values, length in zip(advantages, lengths, strict=True)]

    def _rows_that_train(self, batch: RolloutBatch) -> list[int]:
        """Rollouts with a say in the loss; without those of advantage 0 that contribute exactly
        nothing to the gradient."""
        objective = self.objective_of(batch.index)
        skippable = (
            objective.zero_advantage_is_zero_gradient and not self.config.optimization.kl_coef
        )
        rows = self._rows_that_count(batch)
        return [i for i in rows if not (skippable and batch.advantages[i] == 0)]

    def _rows_that_count(self, batch: RolloutBatch) -> list[int]:
        """The rollouts that the denominator counts: the judged ones; all of them for an objective
        that uses no reward."""
        if not self.objective_of(batch.index).uses_reward:
            return list(range(len(batch.rollouts)))
        return [
            i for i, rollout in enumerate(batch.rollouts) if rollout.verdict != Verdict.CANNOT_JUDGE
        ]

    def _minibatch(self, index: int, part: int) -> list[int]:
        """The prompts of one optimiser step: an equal share of the batch, in a seeded order."""
        rollout, per_batch = self.config.rollout, self.config.optimization.steps_per_rollout_batch
        generator = torch.Generator().manual_seed(
            stream_seed(self.config.seed, "minibatches", index)
        )
        order = torch.randperm(rollout.prompts_per_batch, generator=generator).tolist()
        size = rollout.prompts_per_batch // per_batch
        return sorted(order[part * size : (part + 1) * size])

    # --- update -------------------------------------------------------------------------------------------------------

    def update(self, batch: RolloutBatch, prompts: Sequence[int]) -> Metrics:
        """One optimiser step on the groups `prompts` of a batch; returns its metrics.

        When loss or gradient is not finite the step is skipped: weights, moments and teacher stay
        as they are, and the learning rate goes on, which is a function of the step's number.
        """
        group_size = self.config.rollout.group_size
        wanted = [i for p in prompts for i in range(p * group_size, (p + 1) * group_size)]
        stats = TokenStats()
        loss = self.accumulate_gradient(batch, wanted, stats)
        norm = float(
            torch.nn.utils.clip_grad_norm_(self.parameters, self.config.optimization.max_grad_norm)
        )
        is_skipped = not (math.isfinite(loss) and math.isfinite(norm))
        metrics = rollout_metrics([batch.groups[i] for i in prompts]) | stats.summary()
        metrics |= {
            "optimization/loss": loss,
            "optimization/gradient_norm": norm,
            "optimization/learning_rate": float(self.scheduler.get_last_lr()[0]),
            SKIPPED: 0.0,
        }
        if is_skipped:
            drop_gradient(self.parameters)
            metrics, batch.imitation = metrics_of_skipped(metrics), {}
        self.optimizer.step()
        self.scheduler.step()
        if self.teacher is not None and not is_skipped:
            self.teacher.after_step()
        return metrics

    def accumulate_gradient(
        self, batch: RolloutBatch, wanted: Sequence[int], stats: TokenStats
    ) -> float:
        """Set the gradient to that of the loss over the rollouts `wanted`, and return the loss.

        The denominator is that of all of them, so neither micro-batches nor left-out rows change
        the result. The loss is NaN where the student's own log-probs are not finite.
        """
        loop, objective = self.config.optimization, self.objective_of(batch.index)
        knobs = taken_by(OBJECTIVES[objective.type].function, objective_knobs(objective, self.step))
        kl_coef = at_step(loop.kl_coef, self.step)
        prompts, completions, trains = (
            batch.prompts,
            batch.completions,
            set(self._rows_that_train(batch)),
        )
        rows = [i for i in wanted if i in trains]
        stats.scored_share = len(rows) / len(wanted)
        whole = self._denominator(batch, wanted, stats)
        # Checkpointing only works in training mode; `LanguageModel` has no dropout that this would
        # switch on.
        self.student.model.train(self.config.student.gradient_checkpointing)
        for parameter in self.parameters:
            # Zeros, not None: a step without gradient still moves by the optimiser's momentum.
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            else:
                parameter.grad.zero_()
        total, batch.imitation = 0.0, {}
        for micro in self.scorer.batches(
            [prompts[i] for i in rows], [completions[i] for i in rows]
        ):
            self.before_work()
            part = [rows[i] for i in micro]
            with self.scorer.gradient_in_place():
                scores = self.scorer([prompts[i] for i in part], [completions[i] for i in part])
            if not torch.isfinite(scores.logprobs).all():
                require_sound_weights(self.step + 1, self.parameters)
                total = math.nan
                break
            inputs = self._loss_inputs(batch, part, scores)
            losses, token_stats = token_loss(objective.type, inputs, knobs=knobs, kl_coef=kl_coef)
            loss = aggregate(losses, inputs.trained, mode=loop.aggregation, denominator=whole)
            loss.backward()
            total += float(loss.detach())
            sampled = [torch.tensor(batch.rollouts[i].completion.logprobs) for i in part]
            stats.add(inputs, scores.entropy, padded(sampled, scores.logprobs), token_stats)
            for row, i in enumerate(part):
                if i in wanted[: self.config.rollout.group_size]:
                    batch.imitation[i % self.config.rollout.group_size] = imitation_of(
                        inputs, token_stats, row
                    )
        self.student.model.eval()
        return total

    def _loss_inputs(
        self, batch: RolloutBatch, part: Sequence[int], scores: CompletionScores
    ) -> LossInputs:
        """The tensors of the rollouts `part`, given the student's scores of them."""

        def chosen(values: list[Tensor] | None) -> Tensor | None:
            return None if values is None else padded([values[i] for i in part], scores.logprobs)

        old, advantages, size = (
            chosen(batch.old_logprobs),
            chosen(batch.token_advantages),
            self.config.rollout.group_size,
        )
        correct = torch.tensor(
            [rollout.verdict == Verdict.CORRECT for rollout in batch.rollouts],
            device=scores.mask.device,
        )
        solved = correct.view(-1, size).any(dim=1).repeat_interleave(size)
        return LossInputs(
            student_logprobs=scores.logprobs,
            old_logprobs=scores.logprobs.detach() if old is None else old,
            advantages=batch.advantages[list(part)].to(scores.logprobs)
            if advantages is None
            else advantages,
            mask=scores.mask,
            teacher_logprobs=chosen(batch.teacher_logprobs),
            reference_logprobs=chosen(batch.reference_logprobs),
            is_correct=correct[list(part)],
            group_is_solved=solved[list(part)],
        )

    def _denominator(self, batch: RolloutBatch, wanted: Sequence[int], stats: TokenStats) -> float:
        """The denominator of the rollouts among `wanted` that count, without the tokens that lack a
        finite score.

        Rows that were not scored, as they contribute nothing, count in full.
        """
        counted = set(self._rows_that_count(batch))
        kept = []
        for i in (i for i in wanted if i in counted):
            kept.append(torch.ones(len(batch.rollouts[i].completion.token_ids), dtype=torch.bool))
            for values in (batch.teacher_logprobs, batch.reference_logprobs, batch.old_logprobs):
                if values is not None and len(values[i]):
                    kept[-1] &= torch.isfinite(values[i])
            stats.num_dropped += int((~kept[-1]).sum())
        mask = pad_sequence(kept, batch_first=True) if kept else torch.zeros(0, 0, dtype=torch.bool)
        max_tokens = self.config.rollout.max_completion_tokens
        return denominator(
            mask, mode=self.config.optimization.aggregation, max_completion_tokens=max_tokens
        )
