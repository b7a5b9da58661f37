"""Compute the gradient of an objective over some rollouts, micro-batch by micro-batch."""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rlad.config.rollout import CorrectionConfig
from rlad.config.run import RunConfig
from rlad.config.types import at_step
from rlad.engines.imitation import ImitationMap
from rlad.engines.metrics import TokenStats
from rlad.engines.native.divergence import Comparison
from rlad.engines.rollout_batch import RolloutBatch, padded
from rlad.errors import RunFailedError
from rlad.models.loading import LanguageModel
from rlad.objectives import OBJECTIVES, taken_by, token_loss
from rlad.objectives.aggregate import aggregate, denominator
from rlad.objectives.divergences import Divergence, sampled_divergence
from rlad.objectives.inputs import LossInputs
from rlad.objectives.masks import clean, keep_finite
from rlad.objectives.rollout_weights import rollout_weights
from rlad.scoring.scorer import CompletionScores, Scorer
from rlad.teachers.asking import require_few_missing
from rlad.teachers.base import Teacher


def trained_parameters(student: LanguageModel) -> list[nn.Parameter]:
    return [parameter for parameter in student.model.parameters() if parameter.requires_grad]


class LossGradient:
    """The gradient of an objective's loss at one step, computed into the student's parameters."""

    def __init__(
        self,
        config: RunConfig,
        objective: Any,
        *,
        step: int,
        scorer: Scorer,
        teacher: Teacher | None,
        correction: CorrectionConfig | None,
        before_work: Callable[[], None],
    ):
        """Take the student's `scorer`. The teacher is asked here if the objective compares whole
        distributions. `correction` is for samplers other than the trainer's own model."""
        self.config = config
        self.objective = objective
        self.step = step
        self.scorer = scorer
        self.teacher = teacher
        self.correction = correction
        self.before_work = before_work
        self.parameters = trained_parameters(scorer.language_model)
        self.row = OBJECTIVES[objective.type]
        self.knobs = objective.knobs_at(step)
        self.comparison = self._make_comparison()

    def accumulate(
        self,
        batch: RolloutBatch,
        wanted: Sequence[int],
        stats: TokenStats,
        imitation: ImitationMap | None,
    ) -> float:
        """Add up the gradient over the rollouts `wanted`; returns the loss.

        The denominator is computed over all of them, so neither micro-batches nor left-out rows
        change the result. The loss is NaN if the student's own log-probs are not finite.
        """
        # The denominator counts every token that could train, also of rollouts that contribute
        # nothing and are left out below: leaving them out only saves time.
        trains = set(batch.training_rows)
        rows = [i for i in wanted if i in trains]
        stats.num_rows += len(wanted)
        stats.num_scored += len(rows)
        self.kept = batch.counted_tokens(wanted)
        stats.num_dropped += sum(
            int((batch.actions[i] & ~tokens).sum()) for i, tokens in self.kept.items()
        )
        whole = self._denominator()
        self._set_to_zero()
        model = self.scorer.model
        # Gradient checkpointing only works in training mode; `LanguageModel` has no dropout that
        # this would turn on.
        model.train(self.config.student.gradient_checkpointing)
        total = 0.0
        self.num_missing = 0
        self.num_compared = 0
        teacher = self.teacher if self._asks_teacher else None
        with teacher.at_work() if teacher is not None else nullcontext():
            for micro in self.scorer.batches(*batch.sequences(rows)):
                self.before_work()
                part = [rows[i] for i in micro]
                loss = self._add(batch, part, whole, stats, imitation)
                # Without a finite loss the step is skipped, without the other micro-batches.
                total += math.nan if loss is None else loss
                if loss is None:
                    break
        model.eval()
        # Checked over the whole step, so that the size of micro-batches does not matter.
        require_few_missing(
            self.num_missing,
            self.num_compared,
            max_missing_share=self.config.optimization.max_missing_teacher_share,
            step=self.step + 1,
            asked_again=False,
        )
        if self.num_missing:
            # Tokens that a teacher asked within the update could not score are known only now. They
            # are removed from the denominator too, by rescaling what all parts were divided by.
            factor = whole / self._denominator()
            for parameter in self.parameters:
                assert parameter.grad is not None
                parameter.grad.mul_(factor)
            total *= factor
        return total

    def _denominator(self) -> float:
        """Return the denominator of the whole optimiser step, over the tokens known to train."""
        tokens = [torch.zeros(0, dtype=torch.bool), *self.kept.values()]
        return denominator(
            nn.utils.rnn.pad_sequence(tokens, batch_first=True),
            mode=self.config.optimization.aggregation,
            max_completion_tokens=self.config.rollout.max_completion_tokens,
        )

    def _set_to_zero(self) -> None:
        """Set gradients to zero, not None: the optimiser's momentum still applies in a step without
        gradient."""
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            else:
                parameter.grad.zero_()

    def _add(
        self,
        batch: RolloutBatch,
        part: list[int],
        whole: float,
        stats: TokenStats,
        imitation: ImitationMap | None,
    ) -> float | None:
        """Add the gradient of one micro-batch, the rollouts `part`; return its share of the loss,
        or None if the student's log-probs are not finite."""
        settings = self.config.optimization
        sequences = batch.sequences(part)
        # The output layer and the embeddings are by far the largest matrices. Their gradients are
        # added to `.grad` immediately, so that no second matrix of that size exists.
        with self.scorer.gradient_in_place():
            divergence = self.comparison and self.comparison.of(batch, part)
            scores = self.scorer(*sequences, divergence=divergence)
        if not torch.isfinite(scores.logprobs).all():
            # If the weights are finite, the batch has overflowed, and the step is skipped.
            self._require_sound_weights()
            return None
        if scores.divergence is not None:
            self._count_missing(batch, part, scores.divergence, stats)
        if self.comparison and self.comparison.teacher_logprobs is not None:
            stats.teacher_logprobs |= zip(part, self.comparison.teacher_logprobs, strict=True)
        sampled = [torch.tensor(batch.rollouts[i].completion.logprobs) for i in part]
        if self.objective.written_by == "teacher":  # its log-probs are not the old policy's
            sampled = [torch.full_like(values, torch.nan) for values in sampled]
        rollout_logprobs = padded(sampled, scores.logprobs)
        inputs = batch.loss_inputs(part, scores)
        if self.measure is not None and scores.divergence is None:
            inputs = self._with_sampled_divergence(inputs)
        corrected: dict[str, Tensor] = {}
        if self.correction:
            weights, corrected["rollout_weight_bounded"] = rollout_weights(
                old_logprobs=inputs.old_logprobs,
                rollout_logprobs=rollout_logprobs,
                mask=inputs.mask,
                **dict(self.correction),
            )
            inputs = replace(inputs, rollout_weights=weights)
        losses, token_stats = token_loss(
            self.objective.type,
            inputs,
            knobs=taken_by(self.row.function, self.knobs),
            kl_coef=at_step(settings.kl_coef, self.step),
        )
        token_stats = token_stats | self._clipped_terms(scores)
        loss = aggregate(losses, inputs.trained, mode=settings.aggregation, denominator=whole)
        loss.backward()
        if batch.roles is not None:
            assert inputs.role_evidence is not None
            corrected["role"] = padded([batch.roles[i] for i in part], scores.logprobs)
            corrected["role_evidence"] = inputs.role_evidence
        stats.add(inputs, scores.entropy, rollout_logprobs, token_stats | corrected)
        if imitation is not None:
            imitation.add(part, inputs, token_stats, [batch.actions[i] for i in part])
        return float(loss.detach())

    def _clipped_terms(self, scores: CompletionScores) -> dict[str, Tensor]:
        """Return at which tokens a term of the divergence is at its bound, if it has one."""
        if self.comparison is None or self.comparison.num_clipped is None:
            return {}
        empty = torch.zeros_like(scores.logprobs).detach()
        counts = empty.masked_scatter(scores.mask, self.comparison.num_clipped)
        return {"pointwise_clipped": counts > 0}

    def _require_sound_weights(self) -> None:
        if not all(bool(parameter.isfinite().all()) for parameter in self.parameters):
            raise RunFailedError(
                f"step {self.step + 1}: the student's own log-probs are not finite; its weights "
                "are broken: start a new run with a lower optimization.learning_rate, from an "
                "earlier checkpoint as student.model."
            )

    @property
    def measure(self) -> Divergence | None:
        """Return the divergence that `divergence_to_teacher` holds; None for an objective without
        it."""
        if self.row.divergence is None or not (
            self._asks_teacher or "divergence_to_teacher" in self.row.needs
        ):
            return None
        return self.row.divergence(**taken_by(self.row.divergence, self.knobs))

    @property
    def _asks_teacher(self) -> bool:
        """Return whether the teacher is asked for its distributions within the update."""
        return self.objective.asked_of_teacher != "sampled"

    def _make_comparison(self) -> Comparison | None:
        """Make the comparison of the student's distributions with the teacher's, if the objective
        needs more than the sampled tokens."""
        measure = self.measure
        if measure is None or not self._asks_teacher:
            return None
        assert self.teacher is not None
        return Comparison(
            self.teacher,
            measure,
            support=self.objective.asked_of_teacher,
            top_k=self.objective.top_k,
            bound=self.knobs.get("pointwise_clip"),
        )

    def _with_sampled_divergence(self, inputs: LossInputs) -> LossInputs:
        """Estimate the divergence from the teacher's log-probs of the sampled tokens."""
        assert self.measure is not None
        assert inputs.teacher_logprobs is not None
        kept = keep_finite(inputs.mask, inputs.teacher_logprobs)
        values = sampled_divergence(
            clean(inputs.student_logprobs, kept), clean(inputs.teacher_logprobs, kept), self.measure
        )
        values = torch.where(kept, values, torch.nan)
        return replace(inputs, divergence_to_teacher=values)

    def _count_missing(
        self, batch: RolloutBatch, part: list[int], divergence: Tensor, stats: TokenStats
    ) -> None:
        """Count the tokens without a finite divergence because of the teacher. They are not trained
        on."""
        is_finite = divergence.detach().isfinite().cpu()
        speaks = batch.teacher_speaks.tolist()
        for place, i in enumerate(part):
            if not speaks[i]:
                continue
            actions = batch.actions[i]
            tokens = is_finite[place, : len(actions)]
            num_missing = int((actions & ~tokens).sum())
            stats.num_dropped += num_missing
            self.num_missing += num_missing
            self.num_compared += int(actions.sum())
            self.kept[i] = self.kept[i] & tokens
