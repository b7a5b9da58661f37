"""The loop for one device, in the order of the paper: sample, reward, advantage, score, objective,
step.

Everything random comes from streams named by seed and step, and problems are addressed by index:
the state of a run is its step, its weights, its optimiser and, between the mini-batches of one
rollout batch, that batch.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import get_scheduler

from rlad.config.run import RunConfig
from rlad.engines.base import ResumePoint, SkippedBatch, StepResult, peak_memory
from rlad.engines.imitation import ImitationMap
from rlad.engines.metrics import TokenStats, ranking_metrics, rollout_metrics
from rlad.engines.native.checkpoint import EngineState, batch_tensors, load_state, save_state
from rlad.engines.native.gradient import LossGradient, trained_parameters
from rlad.engines.native.overlap import AskedAhead
from rlad.engines.rollout_batch import RolloutBatch
from rlad.errors import RunFailedError, UserError
from rlad.models.loading import LanguageModel, save_model
from rlad.objectives import OBJECTIVES, taken_by
from rlad.objectives.advantages import group_advantages
from rlad.rollouts.grading import Timer, asked_prompts, graded_groups
from rlad.rollouts.samplers import beside_another, make_sampler, of_teacher
from rlad.rollouts.types import Metrics, RolloutGroup
from rlad.scoring.scorer import Scorer
from rlad.seeds import stream_seed
from rlad.tasks import Task, Verdict
from rlad.teachers.adapter import AdapterScorer
from rlad.teachers.asking import complete_logprobs
from rlad.teachers.base import Teacher
from rlad.teachers.local import LocalTeacher

SKIPPED = "optimization/skipped/count"
SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


class NativeEngine:
    """Trains one student on one device."""

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
        """`before_work` is called before every decoding step and micro-batch; it may raise to stop
        the run there.

        `reference` is the frozen initial student; needed when `kl_coef` is not 0. A LoRA student
        may be its own: its base weights are the initial student.
        """
        loop = config.optimization
        self.config = config
        self.student = student
        self.task = task
        self.teacher = teacher
        self.before_work = before_work
        self.step = 0
        self.flat_step: int | None = None
        self.pending: RolloutBatch | None = None
        self.begun_at: int | None = None
        """the step whose weights write the next rollout batch ahead, if any do"""
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
        scoring: dict[str, Any] = {
            "temperature": config.rollout.temperature,
            "tokens_per_batch": loop.tokens_per_batch,
            "before_work": before_work,
        }
        self.scorer = Scorer(student, **scoring)
        self.reference_scorer: Scorer | None = None
        if reference is student:
            self.reference_scorer = AdapterScorer(student, adapter=None, **scoring)
        elif reference is not None:
            self.reference_scorer = Scorer(reference, **scoring)
        if config.objective.asked_of_teacher != "sampled" and teacher is not None:
            teacher.require_comparable(self.scorer)
            self._require_top_k()
        if config.student.gradient_checkpointing:
            student.model.gradient_checkpointing_enable()
        teacher_writes = config.objective.written_by == "teacher"
        rollout = beside_another(config.rollout) if teacher_writes else config.rollout
        self.sampler = make_sampler(student, rollout, before_work)
        # What writes the completions that are trained on.
        self.writer = self.sampler
        if teacher_writes:
            try:
                with self.local_teacher.at_work():
                    teacher_model = self.local_teacher.language_model
                    self.writer = make_sampler(teacher_model, of_teacher(rollout))
            except BaseException:
                self.sampler.close()
                raise

    def _require_top_k(self) -> None:
        """Raise `UserError` where more tokens are to be told apart than there are."""
        objective: Any = self.config.objective
        vocabulary = self.student.vocabulary
        if "top_k" in objective.asked_of_teacher and objective.top_k > vocabulary:
            raise UserError(
                f"objective.top_k is {objective.top_k}, but the student's vocabulary has "
                f"{vocabulary} tokens; lower it, or compare all of them."
            )

    def steps(self) -> Iterator[StepResult]:
        """Optimiser steps until `num_steps`; between two of them the state may be saved."""
        per_batch = self.config.optimization.steps_per_rollout_batch
        while self.step < self.config.optimization.num_steps:
            if self.pending is None:
                self.pending = self.make_rollout_batch(self.step // per_batch)
                self.before_work()
            # Where the batch was restored, or no server could begin.
            self.begin_ahead(self.pending.index + 1, Timer())
            # A rollout batch serves `per_batch` steps, each on other prompts. What is measured
            # of the batch as a whole is reported with the first of them.
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
        # Nothing random is restored: seeds and problems follow from the step's number.
        self.step = state.step
        self.scheduler.load_state_dict(state.scheduler)
        # The optimiser of a new engine is at the first learning rate of the schedule.
        groups = self.optimizer.state_dict()["param_groups"]
        for group, learning_rate in zip(groups, self.scheduler.get_last_lr(), strict=True):
            group["lr"] = learning_rate
        self.optimizer.load_state_dict({"state": state.moments, "param_groups": groups})
        # What trains of a batch follows from its verdicts and advantages; it is not stored.
        self.pending = state.pending
        if self.pending is not None:
            self.choose_what_trains(self.pending)

    @property
    def _teacher_identity(self) -> str | None:
        return None if self.teacher is None else self.teacher.identity

    @property
    def local_teacher(self) -> LocalTeacher:
        """The teacher of an objective that needs its model; a config with another is refused."""
        assert isinstance(self.teacher, LocalTeacher)
        return self.teacher

    def follow(self) -> None:
        """There is no other process."""

    def close(self) -> None:
        self.sampler.close()
        self.writer.close()
        if self.teacher is not None:
            self.teacher.close()

    def objective_at(self, batch_index: int) -> Any:
        """The config of the objective whose turn it is at a rollout batch."""
        objective = self.config.objective
        loop = self.config.optimization
        first_step = batch_index * loop.steps_per_rollout_batch
        return objective.at_step(first_step, loop.num_steps, flat_step=self.flat_step)

    # --- rollouts ---------------------------------------------------------------------------------

    def make_rollout_batch(self, index: int) -> RolloutBatch:
        """Everything that the steps on one batch of prompts need, in the order of the paper."""
        objective = self.objective_at(index)
        scores_tokens = (
            objective.needs_teacher
            and objective.written_by == "student"
            and objective.asked_of_teacher == "sampled"
        )
        timer = Timer()
        teacher = self.teacher if scores_tokens else None
        ahead = AskedAhead(teacher) if teacher and teacher.works_elsewhere else None

        # A teacher that works elsewhere begins with a group while others are still written.
        def after_group(number: int, group: RolloutGroup) -> None:
            if ahead is not None:
                with timer("teacher"):
                    requests = self.with_advantages(index, [group]).teacher_requests()
                    ahead.submit(number, requests)

        with ExitStack() as held:
            if teacher is not None:
                held.callback(teacher.cancel)  # what an error leaves under way

            # 1. Sample a group of completions for each prompt, and grade them. With
            # `max_staleness` they were begun one batch ago, and the next ones are begun now.
            sampled_at = self.step if self.begun_at is None else self.begun_at
            groups = self.sample_groups(index, timer=timer, after_group=after_group)
            # What fails here fails again once this batch is whole, and is not lost with it.
            with suppress(RunFailedError):
                self.begin_ahead(index + 1, timer)

            # 2. Advantages, and with them which completions can contribute to the gradient at all.
            batch = self.with_advantages(index, groups)

            # 3. What the teacher says of those completions; then reference and old policy.
            if teacher is not None:
                with timer("teacher"):
                    batch.teacher_logprobs = batch.by_rollout(
                        self._ask_teacher(batch, ahead), batch.teacher_rows
                    )
                num_tokens = sum(map(len, batch.teacher_logprobs))
                batch.counts = {"teacher/tokens/count": num_tokens} | teacher.pop_metrics()
                batch.counts |= ranking_metrics(groups, batch.teacher_logprobs)
            elif objective.needs_teacher:
                # It has written the completions, or compares their tokens within the update.
                by_teacher = objective.written_by == "teacher"
                rows = range(len(batch.rollouts)) if by_teacher else batch.teacher_rows
                num_tokens = sum(len(batch.completions[i]) for i in rows)
                batch.counts = {"teacher/tokens/count": num_tokens}
            if batch.spoken_share < 1:
                batch.counts["teacher/speaks/frac"] = batch.spoken_share
        self.add_local_scores(batch, timer=timer)
        batch.seconds = timer.seconds
        batch.counts |= self.staleness(sampled_at)
        if ahead is not None:
            batch.seconds["teacher/overlap/seconds"] = ahead.overlap_seconds
        return batch

    def add_local_scores(self, batch: RolloutBatch, *, timer: Timer) -> None:
        """Score a batch by the reference and the old policy, as far as its objective needs it."""
        objective = self.objective_at(batch.index)
        make_token_advantages = OBJECTIVES[objective.type].token_advantages
        if self.reference_scorer is not None:
            with timer("reference"):
                batch.reference_logprobs = self._scores(batch, self.reference_scorer)
        # With one step for each rollout batch the student is the old policy while it is updated,
        # and its own log-probs, detached, save this pass.
        student_moves = self.config.optimization.steps_per_rollout_batch > 1
        if objective.written_by == "student" and (student_moves or make_token_advantages):
            with timer("old_logprobs"):
                batch.old_logprobs = self._scores(batch, self.scorer)
        if make_token_advantages:
            knobs = taken_by(make_token_advantages, objective.knobs_at(self.step))
            batch.make_token_advantages(partial(make_token_advantages, **knobs))

    def sample_groups(
        self,
        index: int,
        *,
        timer: Timer,
        after_group: Callable[[int, RolloutGroup], None] = lambda number, group: None,
    ) -> list[RolloutGroup]:
        """A graded group for each prompt of a rollout batch, by the student or by its teacher."""
        by_teacher = self.objective_at(index).written_by == "teacher"
        stream = "teacher rollouts" if by_teacher else "rollouts"
        with self.local_teacher.at_work() if by_teacher else nullcontext():
            if self.begun_at is None and not self.writer.is_trainers_own:
                with timer("hand_over"):
                    self.writer.update_weights()
            self.begun_at = None
            return graded_groups(
                self.student,
                self.task,
                "train",
                self.problems_of(index),
                rollout=self.config.rollout,
                seed=stream_seed(self.config.seed, stream, index),
                problem_seed=self.config.seed,
                sampler=self.writer,
                before_work=self.before_work,
                after_group=after_group,
                timer=timer,
            )

    def staleness(self, sampled_at: int) -> Metrics:
        """Return the age in steps of a batch that the weights of step `sampled_at` wrote, where
        there may be one."""
        age = float(self.step - sampled_at)
        return {"rollout/staleness/steps": age} if self.config.rollout.max_staleness else {}

    def begin_ahead(self, index: int, timer: Timer) -> None:
        """Have the next rollout batch written by the student as it is, while it trains on the
        present one."""
        rollout = self.config.rollout
        is_last = index >= self.config.optimization.num_rollout_batches
        if not rollout.max_staleness or is_last or self.begun_at is not None:
            return
        if self.objective_at(index).written_by == "teacher":
            return
        with timer("hand_over"):
            indices = self.problems_of(index)
            seed = self.config.seed
            asked = asked_prompts(self.student, self.task, "train", indices, rollout, seed)
            self.sampler.begin(
                [one.prompt for one in asked],
                group_size=rollout.group_size,
                max_completion_tokens=rollout.max_completion_tokens,
                temperature=rollout.temperature,
                seed=stream_seed(seed, "rollouts", index),
                before_token=self.before_work,
            )
        self.begun_at = self.step

    def problems_of(self, index: int) -> range:
        """The numbers of the training problems of a rollout batch."""
        size = self.config.rollout.prompts_per_batch
        return range(index * size, (index + 1) * size)

    def with_advantages(self, index: int, groups: Sequence[RolloutGroup]) -> RolloutBatch:
        """Some groups of a rollout batch, with their advantages and what of them trains."""
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        advantages = group_advantages(
            torch.tensor([r.reward for r in rollouts], dtype=torch.float64),
            len(groups[0].rollouts),
            scale=self.config.optimization.advantage_scale,
            judged=torch.tensor([r.verdict != Verdict.CANNOT_JUDGE for r in rollouts]),
        )
        batch = RolloutBatch(index, groups, advantages)
        self.choose_what_trains(batch)
        return batch

    def choose_what_trains(self, batch: RolloutBatch) -> None:
        """Leave out the rollouts that cannot contribute to the gradient of their objective."""
        objective = self.objective_at(batch.index)
        batch.choose_what_trains(
            objective,
            step=batch.index * self.config.optimization.steps_per_rollout_batch,
            has_leash=bool(self.config.optimization.kl_coef),
            vocabulary=self.student.vocabulary,
            teacher=self.teacher if objective.needs_teacher else None,
        )

    def _scores(self, batch: RolloutBatch, scorer: Scorer) -> list[Tensor]:
        rows = batch.training_rows
        return batch.by_rollout(scorer.score(*batch.sequences(rows)), rows)

    def _ask_teacher(self, batch: RolloutBatch, ahead: AskedAhead | None = None) -> list[Tensor]:
        """The teacher's log-probs of the rollouts that train, for which it may have been asked
        ahead."""
        assert self.teacher is not None
        return complete_logprobs(
            self.teacher,
            batch.teacher_requests(),
            max_missing_share=self.config.optimization.max_missing_teacher_share,
            step=self.step + 1,
            answers=None if ahead is None else ahead.wait(),
        )

    # --- update -----------------------------------------------------------------------------------

    def minibatch(self, index: int, part: int) -> list[int]:
        """The prompts of one optimiser step: an equal share of the batch, in a seeded order."""
        num_prompts = self.config.rollout.prompts_per_batch
        size = num_prompts // self.config.optimization.steps_per_rollout_batch
        seed = stream_seed(self.config.seed, "minibatches", index)
        order = torch.randperm(num_prompts, generator=torch.Generator().manual_seed(seed)).tolist()
        return sorted(order[part * size : (part + 1) * size])

    def update(
        self, batch: RolloutBatch, prompts: Sequence[int], imitation: ImitationMap | None = None
    ) -> Metrics:
        """One optimiser step on the groups `prompts` of a batch; returns its metrics.

        When loss or gradient is not finite the step is skipped: weights, moments and teacher stay
        as they are, and the learning rate moves on, which is a function of the step's number.
        """
        size = batch.group_size
        stats = TokenStats()
        wanted = [i for p in prompts for i in range(p * size, (p + 1) * size)]
        loss = self.accumulate_gradient(batch, wanted, stats, imitation)
        norm = float(
            torch.nn.utils.clip_grad_norm_(self.parameters, self.config.optimization.max_grad_norm)
        )
        metrics = rollout_metrics([batch.groups[i] for i in prompts]) | stats.summary()
        if self.teacher is not None:  # which may have been asked within the update
            metrics |= self.teacher.pop_metrics()
        metrics |= {
            "optimization/loss": loss,
            "optimization/gradient_norm": norm,
            "optimization/learning_rate": float(self.scheduler.get_last_lr()[0]),
            SKIPPED: 0.0,
        }
        is_skipped = not (math.isfinite(loss) and math.isfinite(norm))
        if is_skipped:
            # Without gradients the optimiser leaves weights and moments as they are; zeros would
            # move them by the momentum.
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

    def accumulate_gradient(
        self,
        batch: RolloutBatch,
        wanted: Sequence[int],
        stats: TokenStats,
        imitation: ImitationMap | None = None,
    ) -> float:
        """Set the gradient to that of the loss over the rollouts `wanted`; returns the loss."""
        return LossGradient(
            self.config,
            self.objective_at(batch.index),
            step=self.step,
            scorer=self.scorer,
            teacher=self.teacher,
            correction=None if self.sampler.is_trainers_own else self.config.rollout.correction,
            before_work=self.before_work,
        ).accumulate(batch, wanted, stats, imitation)
