"""The loop for one device, top to bottom as the paper tells it: sample, reward, advantage, score, objective, step.

Everything random comes from streams named by seed and step, and problems are addressed by index: the state of a run is its
step, its weights, its optimiser and, between the mini-batches of one rollout batch, that batch.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import get_scheduler

from rlad.advantages import group_advantages
from rlad.aggregate import aggregate, denominator
from rlad.batch import LossInputs
from rlad.config import Annealed, RunConfig
from rlad.errors import RunFailedError
from rlad.language_model import LanguageModel
from rlad.metrics import Metrics, TokenStats, rollout_metrics
from rlad.objectives import OBJECTIVES, token_loss
from rlad.prompts import check_prompt_length, prompt_token_ids
from rlad.rollouts import Completion, Rollout, RolloutGroup
from rlad.sampling import sample
from rlad.scoring import CompletionScores, Scorer
from rlad.seeds import stream_seed
from rlad.tasks import Problem, Task, Verdict
from rlad.teachers import Teacher

SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


@dataclass(slots=True)
class RolloutBatch:
    """The rollouts of one batch of prompts and what was scored on them; lists are by rollout, group after group."""

    index: int
    groups: list[RolloutGroup]
    advantages: Tensor
    teacher_logprobs: list[Tensor] | None = None
    reference_logprobs: list[Tensor] | None = None
    old_logprobs: list[Tensor] | None = None
    """None: the student has not moved since it sampled, so they are its own log-probs"""
    seconds: Metrics = field(default_factory=dict)

    @property
    def rollouts(self) -> list[Rollout]:
        return [rollout for group in self.groups for rollout in group.rollouts]

    @property
    def prompts(self) -> list[tuple[int, ...]]:
        return [group.prompt_token_ids for group in self.groups for _ in group.rollouts]

    @property
    def completions(self) -> list[tuple[int, ...]]:
        return [rollout.completion.token_ids for rollout in self.rollouts]


@dataclass(frozen=True, slots=True)
class StepResult:
    """One optimiser step: its number (from 1), its metrics and the groups it was made on."""

    step: int
    metrics: Metrics
    groups: Sequence[RolloutGroup]


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
        """`before_work` is called before every decoding step and micro-batch; it may raise to stop the run there.

        `reference` is the frozen initial student; needed when `kl_coef` is not 0.
        """
        loop = config.optimization
        self.config, self.student, self.task, self.teacher = config, student, task, teacher
        self.objective = OBJECTIVES[config.objective.type]
        self.before_work = before_work
        self.step = 0
        self.pending: RolloutBatch | None = None
        self.optimizer = torch.optim.AdamW(
            student.model.parameters(), lr=loop.learning_rate, betas=loop.betas, weight_decay=loop.weight_decay
        )
        self.scheduler = get_scheduler(
            SCHEDULES[loop.schedule], self.optimizer, num_warmup_steps=loop.warmup_steps, num_training_steps=loop.num_steps
        )
        scoring = {"temperature": config.rollout.temperature, "tokens_per_batch": loop.tokens_per_batch}
        self.scorer = Scorer(student, **scoring)
        self.reference_scorer = Scorer(reference, **scoring) if reference else None
        if config.student.gradient_checkpointing:
            student.model.gradient_checkpointing_enable()

    def steps(self) -> Iterator[StepResult]:
        """Optimiser steps until `num_steps`; between two of them the engine's state may be saved."""
        per_batch = self.config.optimization.steps_per_rollout_batch
        while self.step < self.config.optimization.num_steps:
            if self.pending is None:
                self.pending = self.make_rollout_batch(self.step // per_batch)
            batch, part = self.pending, self.step % per_batch
            started = time.monotonic()
            prompts = self._minibatch(batch.index, part)
            metrics = self.update(batch, prompts)
            metrics |= {"time/update/seconds": time.monotonic() - started} | (batch.seconds if part == 0 else {})
            self.step += 1
            if part == per_batch - 1:
                self.pending = None
            yield StepResult(self.step, metrics, [batch.groups[i] for i in prompts])

    # --- rollouts -----------------------------------------------------------------------------------------------------

    def make_rollout_batch(self, index: int) -> RolloutBatch:
        """Sample, reward, advantage; then what the objective needs from teacher, reference and old policy."""
        rollout, seconds = self.config.rollout, {}
        indices = range(index * rollout.prompts_per_batch, (index + 1) * rollout.prompts_per_batch)
        problems = [self.task.problem("train", i, seed=self.config.seed) for i in indices]
        with _timed(seconds, "time/generation/seconds"):
            prompts, completions = self._sample(index, problems)
        with _timed(seconds, "time/rewards/seconds"):
            groups = [
                RolloutGroup(i, problem.prompt, tuple(prompt), tuple(self._judge(problem, group)))
                for i, problem, prompt, group in zip(indices, problems, prompts, completions, strict=True)
            ]
        rewards = torch.tensor([r.reward for group in groups for r in group.rollouts], dtype=torch.float64)
        judged = torch.tensor([r.verdict != Verdict.CANNOT_JUDGE for group in groups for r in group.rollouts])
        scale = self.config.optimization.advantage_scale
        batch = RolloutBatch(
            index, groups, group_advantages(rewards, rollout.group_size, scale=scale, judged=judged), seconds=seconds
        )
        rows = self._rows_that_train(batch)
        if self.objective.needs_teacher:
            assert self.teacher is not None
            with _timed(seconds, "time/teacher/seconds"):
                batch.teacher_logprobs = _score_rows(self.teacher.logprobs, batch, rows)
        if self.reference_scorer is not None:
            with _timed(seconds, "time/reference/seconds"):
                batch.reference_logprobs = _score_rows(self.reference_scorer.score, batch, rows)
        if self.config.optimization.steps_per_rollout_batch > 1:
            with _timed(seconds, "time/old_logprobs/seconds"):
                batch.old_logprobs = _score_rows(self.scorer.score, batch, rows)
        return batch

    def _sample(self, index: int, problems: Sequence[Problem]) -> tuple[list[list[int]], list[list[Completion]]]:
        """The prompts as token ids, and a group of completions of each."""
        rollout, student = self.config.rollout, self.student
        prompts = [prompt_token_ids(student.tokenizer, p.prompt, rollout.prompt_format) for p in problems]
        for i, prompt in enumerate(prompts, start=index * rollout.prompts_per_batch):
            check_prompt_length(len(prompt), f"training problem {i}", rollout, student.context_tokens)
        return prompts, sample(
            student,
            prompts,
            group_size=rollout.group_size,
            max_completion_tokens=rollout.max_completion_tokens,
            temperature=rollout.temperature,
            seed=stream_seed(self.config.seed, "rollouts", index),
            max_batch_rows=rollout.max_batch_rows,
            before_token=self.before_work,
        )

    def _judge(self, problem: Problem, completions: Sequence[Completion]) -> list[Rollout]:
        texts = self.student.tokenizer.batch_decode([list(c.token_ids) for c in completions], skip_special_tokens=True)
        judgements = []
        for text in texts:
            self.before_work()
            judgements.append(self.task.judge(problem, text))
        return [
            Rollout(completion, text, str(judgement.verdict), judgement.reward)
            for completion, text, judgement in zip(completions, texts, judgements, strict=True)
        ]

    def _rows_that_train(self, batch: RolloutBatch) -> list[int]:
        """Rollouts with a say in the loss; without those of advantage 0 that contribute exactly nothing to the gradient."""
        skippable = self.objective.zero_advantage_is_zero_gradient and not self.config.optimization.kl_coef
        rows = self._rows_that_count(batch)
        return [i for i in rows if not (skippable and batch.advantages[i] == 0)]

    def _rows_that_count(self, batch: RolloutBatch) -> list[int]:
        """The rollouts that the denominator counts: the judged ones; all of them for an objective that uses no reward."""
        if "advantages" not in self.objective.needs:
            return list(range(len(batch.rollouts)))
        return [i for i, rollout in enumerate(batch.rollouts) if rollout.verdict != Verdict.CANNOT_JUDGE]

    def _minibatch(self, index: int, part: int) -> list[int]:
        """The prompts of one optimiser step: an equal share of the batch, in a seeded order."""
        rollout, per_batch = self.config.rollout, self.config.optimization.steps_per_rollout_batch
        generator = torch.Generator().manual_seed(stream_seed(self.config.seed, "minibatches", index))
        order = torch.randperm(rollout.prompts_per_batch, generator=generator).tolist()
        size = rollout.prompts_per_batch // per_batch
        return sorted(order[part * size : (part + 1) * size])

    # --- update -------------------------------------------------------------------------------------------------------

    def update(self, batch: RolloutBatch, prompts: Sequence[int]) -> Metrics:
        """One optimiser step on the groups `prompts` of a batch; returns its metrics.

        Raises `ValueError`, before the weights change, when loss or gradient is not finite or the teacher gave nothing.
        """
        group_size = self.config.rollout.group_size
        wanted = [i for p in prompts for i in range(p * group_size, (p + 1) * group_size)]
        stats = TokenStats()
        loss = self.accumulate_gradient(batch, wanted, stats)
        parameters = list(self.student.model.parameters())
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, self.config.optimization.max_grad_norm))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise RunFailedError(
                f"step {self.step + 1}: loss {loss} and gradient norm {norm} must be finite, so the weights were left as they "
                "are; start a new run with a lower optimization.learning_rate, or with objective.teacher_log_ratio_clip = 1.0."
            )
        metrics = rollout_metrics([batch.groups[i] for i in prompts]) | stats.summary()
        metrics |= {
            "optimization/loss": loss,
            "optimization/gradient_norm": norm,
            "optimization/learning_rate": float(self.scheduler.get_last_lr()[0]),
        }
        self.optimizer.step()
        self.scheduler.step()
        return metrics

    def accumulate_gradient(self, batch: RolloutBatch, wanted: Sequence[int], stats: TokenStats) -> float:
        """Set the gradient to that of the loss over the rollouts `wanted`, and return the loss.

        The denominator is that of all of them, so neither micro-batches nor left-out rows change the result.
        """
        loop, knobs = self.config.optimization, objective_knobs(self.config.objective, self.step)
        kl_coef = at_step(loop.kl_coef, self.step)
        prompts, completions, trains = batch.prompts, batch.completions, set(self._rows_that_train(batch))
        rows = [i for i in wanted if i in trains]
        stats.scored_share = len(rows) / len(wanted)
        whole = self._denominator(batch, wanted, stats)
        if rows and stats.num_dropped == sum(len(completions[i]) for i in rows):
            raise RunFailedError(
                f"step {self.step + 1}: the teacher gave no finite log-prob for any of {stats.num_dropped} tokens; check that "
                "it is the right model, and its dtype (bfloat16 instead of float16)."
            )
        # Checkpointing only works in training mode; `LanguageModel` has no dropout that this would switch on.
        self.student.model.train(self.config.student.gradient_checkpointing)
        for parameter in self.student.model.parameters():
            # Zeros, not None: a step without gradient still moves by the optimiser's momentum.
            parameter.grad = torch.zeros_like(parameter)
        total = 0.0
        for micro in self.scorer.batches([prompts[i] for i in rows], [completions[i] for i in rows]):
            self.before_work()
            part = [rows[i] for i in micro]
            scores = self.scorer([prompts[i] for i in part], [completions[i] for i in part])
            inputs = self._loss_inputs(batch, part, scores)
            losses, token_stats = token_loss(self.config.objective.type, inputs, knobs=knobs, kl_coef=kl_coef)
            loss = aggregate(losses, inputs.trained, mode=loop.aggregation, denominator=whole)
            loss.backward()
            total += float(loss.detach())
            sampled = [torch.tensor(batch.rollouts[i].completion.logprobs) for i in part]
            stats.add(inputs, scores.entropy, _padded(sampled, scores.logprobs), token_stats)
        self.student.model.eval()
        return total

    def _loss_inputs(self, batch: RolloutBatch, part: Sequence[int], scores: CompletionScores) -> LossInputs:
        """The tensors of the rollouts `part`, given the student's scores of them."""
        if not torch.isfinite(scores.logprobs).all():
            raise RunFailedError(
                f"step {self.step + 1}: the student's own log-probs are not finite; its weights are broken: start a new "
                "run with a lower optimization.learning_rate, from an earlier checkpoint as student.model."
            )

        def padded(values: list[Tensor] | None) -> Tensor | None:
            return None if values is None else _padded([values[i] for i in part], scores.logprobs)

        old = padded(batch.old_logprobs)
        return LossInputs(
            student_logprobs=scores.logprobs,
            old_logprobs=scores.logprobs.detach() if old is None else old,
            advantages=batch.advantages[list(part)].to(scores.logprobs),
            mask=scores.mask,
            teacher_logprobs=padded(batch.teacher_logprobs),
            reference_logprobs=padded(batch.reference_logprobs),
        )

    def _denominator(self, batch: RolloutBatch, wanted: Sequence[int], stats: TokenStats) -> float:
        """The denominator of the rollouts among `wanted` that count, without the tokens that lack a finite score.

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
        return denominator(mask, mode=self.config.optimization.aggregation, max_completion_tokens=max_tokens)


def at_step(knob: float | Annealed, step: int) -> float:
    """The value of a knob that may be annealed."""
    return knob.at(step) if isinstance(knob, Annealed) else knob


def objective_knobs(objective: Any, step: int) -> dict[str, Any]:
    """The keyword arguments that an objective's config gives its function at a step ("off" is None)."""
    knobs = {name: getattr(objective, name) for name in type(objective).model_fields if name != "type"}
    return {k: None if v == "off" else at_step(v, step) if isinstance(v, Annealed) else v for k, v in knobs.items()}


def _padded(rows: Sequence[Tensor], like: Tensor) -> Tensor:
    """Rows `[length]` as one tensor `[row, longest length]` of the dtype and device of `like`, 0 behind each row's end."""
    return pad_sequence(list(rows), batch_first=True).to(like)


def _score_rows(score: Callable[..., list[Tensor]], batch: RolloutBatch, rows: Sequence[int]) -> list[Tensor]:
    """Scores of some rollouts of a batch, in a list over all of them; empty tensors for the others.

    Raises `ValueError` when a completion did not get one score per token.
    """
    prompts, completions, results = batch.prompts, batch.completions, [torch.empty(0)] * len(batch.rollouts)
    values = score([prompts[i] for i in rows], [completions[i] for i in rows])
    for i, value in zip(rows, values, strict=True):
        if len(value) != len(completions[i]):
            raise ValueError(
                f"rollout {i} has {len(completions[i])} tokens but {len(value)} log-probs came back for it; "
                "a teacher must give one for each token, NaN where it has none."
            )
        results[i] = value
    return results


@contextmanager
def _timed(seconds: Metrics, key: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    seconds[key] = time.monotonic() - started
