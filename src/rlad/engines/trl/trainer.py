"""TRRD and the other objectives in TRL's GRPO trainer.

The teacher's log-probs are added to the rollouts, and our objective is the loss.

Three of TRL's methods are overridden, `_generate_and_score_completions`, `_calculate_rewards` and
`_compute_loss`. Sampling, rewards, optimiser, several devices, vLLM, checkpoints and trackers are
TRL's.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import PreTrainedModel
from trl.trainer.grpo_trainer import GRPOTrainer

from rlad.engines.metrics import TokenStats
from rlad.engines.trl.config import RLADConfig
from rlad.engines.trl.teacher import as_teacher
from rlad.errors import RunFailedError, UserError
from rlad.objectives import token_loss
from rlad.objectives.advantages import group_advantages
from rlad.objectives.aggregate import aggregate
from rlad.objectives.inputs import LossInputs
from rlad.objectives.masks import keep_finite
from rlad.rollouts.grading import Timer
from rlad.teachers.asking import ask_twice, count_missing, require_few_missing
from rlad.teachers.base import Teacher, TeacherRequest
from rlad.teachers.sharded import ShardedTeacher

RequestOf = Callable[[int, dict[str, Any], list[int], list[int]], TeacherRequest]
SCORED = ("teacher_logprobs", "ref_per_token_logps", "old_per_token_logps")


class RLADTrainer(GRPOTrainer):
    """A `GRPOTrainer` with a teacher: `RLADTrainer(model=..., teacher=..., reward_funcs=...,
    args=RLADConfig(...), ...)`."""

    args: RLADConfig
    model: Any
    num_generations: int
    num_generations_eval: int
    max_completion_length: int

    def __init__(
        self,
        model: Any,
        *,
        teacher: Teacher | PreTrainedModel | str | None = None,
        args: RLADConfig,
        request_of: RequestOf = lambda number, row, prompt, completion: TeacherRequest(
            prompt, completion
        ),
        timer: Timer | None = None,
        **settings: Any,
    ):
        """Make the trainer. `teacher` may be a model's name or folder, a transformers model, or a
        `Teacher` that scores at `args.temperature`.

        For a privileged teacher, `request_of` makes the request about a completion from its index
        in this process, its row of the data set, and the tokens of prompt and completion. `timer`
        measures the parts of a step. `settings` are those of `GRPOTrainer`. Raises `UserError` for
        a combination that cannot be trained.
        """
        objective = args.objective_config
        # With an adapter the reference is the base model, which is in memory already.
        is_whole = isinstance(model, PreTrainedModel) and settings.get("peft_config") is None
        if objective.needs_teacher and teacher is None:
            raise UserError(
                f"objective {objective.type!r} needs a teacher; pass teacher=..., or use 'grpo'."
            )
        if args.beta and is_whole and not model.config.name_or_path:
            raise UserError(
                f"beta = {args.beta} needs the initial student as the reference, which TRL loads "
                "from the student's folder, but this student was made in memory; save it and pass "
                "the folder, or set beta = 0."
            )
        super().__init__(model=model, args=args, **settings)
        # TRL itself determines these two while it is made.
        if self._is_vlm or self.aux_loss_enabled:
            raise UserError(
                "RLADTrainer trains only on text, and does not support a router's auxiliary loss; "
                "pass a tokenizer as processing_class, and set router_aux_loss_coef = 0."
            )
        self.teacher = None
        if objective.needs_teacher:
            self.teacher = as_teacher(
                teacher, args, self._tokenizer, self.accelerator, student=self.model
            )
        self.request_of = request_of
        self.timer = timer or Timer()
        self.window = TokenStats()
        """Stats of the micro-batches since the last optimiser step."""

    def _send_telemetry(self) -> None:
        """Send nothing."""

    @property
    def mode(self) -> str:
        return "train" if self.model.training else "eval"

    # --- rollouts ---------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Add to TRL's rollouts what our loss needs: `teacher_logprobs` and `counted` [batch,
        token], `denominator` [].

        `counted` are the tokens that the denominator counts: all of the mask for which every score
        is finite.
        """
        with self.timer("generation"):
            batch = super()._generate_and_score_completions(inputs)
        if self.args.advantages == "rlad":
            self._replace_advantages(batch)
        # A token counts if everything that the loss needs is finite for it. The teacher is not
        # asked about a completion that contributes nothing anyway: its tokens count, without a
        # teacher log-prob.
        counted = _mask(batch)
        if self.teacher is not None:
            asked = counted & ~self._is_idle(batch)[:, None]
            with self.timer("teacher"):
                batch["teacher_logprobs"] = self._ask_teacher(batch, asked, inputs)
            counted = keep_finite(counted, torch.where(asked, batch["teacher_logprobs"], 0))
        batch["counted"] = keep_finite(
            counted, *(batch[name] for name in SCORED[1:] if name in batch)
        )
        # TRL counts a completion that `mask_truncated_completions` empties.
        num_rows = (batch["counted"].any(dim=1) | ~batch["completion_mask"].bool().any(dim=1)).sum()
        whole = {
            "sequence_mean": num_rows,
            "token_mean": batch["counted"].sum(),
            "constant_length": num_rows * self.max_completion_length,
        }[self.args.aggregation]
        batch["denominator"] = self._over_processes(whole).clamp(min=1)
        for key, seconds in self.timer.seconds.items():
            self._metrics[self.mode][key].append(seconds)
        self.timer.seconds.clear()
        return batch

    def _is_idle(self, batch: dict[str, Any]) -> Tensor:
        """Return the completions `[batch]` that contribute exactly nothing to the gradient, so that
        the teacher need not be asked."""
        objective = self.args.objective_config
        skippable = objective.zero_advantage_is_zero_gradient and not self.beta
        return (batch["advantages"] == 0) & skippable

    def _calculate_rewards(
        self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any
    ) -> Tensor:
        """Keep the rewards `[completion, function]` of all processes, which TRL does not return."""
        self._rewards = super()._calculate_rewards(
            inputs, prompts, completions, completion_ids_list
        )
        return self._rewards

    def _replace_advantages(self, batch: dict[str, Any]) -> None:
        """Compute the advantages as the native engine does, and mask completions that no reward
        function judged."""
        each = self._rewards.cpu().double()
        judged = each.isfinite().any(dim=1)
        training = self.mode == "train"
        # A group's rollouts may be on several processes, so each process computes all advantages
        # and takes its own part.
        advantages = group_advantages(
            (each * self.reward_weights.to(each)).nansum(dim=1),
            self.num_generations if training else self.num_generations_eval,
            scale="none" if self.scale_rewards == "none" else "std",
            judged=judged,
        )
        size = len(batch["advantages"])
        first = size * self.accelerator.process_index
        batch["advantages"] = advantages[first : first + size].to(batch["advantages"])
        if self.args.objective_config.uses_reward:
            # TRL multiplies the tool mask into the completion mask everywhere, so this is where
            # completions that were not judged can be left out.
            mask = batch.get("tool_mask", batch["completion_mask"])
            batch["tool_mask"] = mask * judged[first : first + size, None].to(mask)

    def _ask_teacher(
        self, batch: dict[str, Any], asked: Tensor, rows: Sequence[dict[str, Any]]
    ) -> Tensor:
        """Return the teacher's log-probs `[batch, token]`, NaN where there are none.

        Raises `RunFailedError`, on every process, if too many of the tokens in `asked` have none
        even after a second request.
        """
        assert self.teacher is not None
        most = self.args.max_missing_teacher_share
        wanted = asked.any(dim=1).nonzero().flatten().tolist()
        requests = []
        for i in wanted:
            is_token = batch["completion_mask"][i].bool()
            prompt = batch["prompt_ids"][i][batch["prompt_mask"][i].bool()].tolist()
            completion = batch["completion_ids"][i][is_token].tolist()
            request = self.request_of(i, rows[i], prompt, completion)
            if "tool_mask" in batch:
                # The teacher reads the environment's tokens, but their log-probs are not needed.
                actions = batch["tool_mask"][i][is_token].bool().tolist()
                request = replace(request, actions=actions)
            requests.append(request)
        # All processes ask a sharded teacher at the same time, and only once: asking again would
        # change nothing.
        is_split = isinstance(self.teacher, ShardedTeacher)
        scores = ask_twice(self.teacher, requests, max_missing_share=1.0 if is_split else most)
        result = torch.full(asked.shape, torch.nan, dtype=scores[0].dtype if scores else None)
        for i, values in zip(wanted, scores, strict=True):
            result[i, : len(values)] = values
        # The share is computed over all processes; otherwise one could raise while the others wait
        # for it.
        counts = torch.tensor(count_missing(scores, requests), device=asked.device)
        missing, total = self._over_processes(counts).tolist()
        step = self.state.global_step + 1
        require_few_missing(missing, total, max_missing_share=most, step=step)
        for key, value in ({"teacher/tokens/count": total} | self.teacher.pop_metrics()).items():
            self._metrics[self.mode][key].append(float(value))
        return result.to(asked.device)

    # --- loss -------------------------------------------------------------------------------------

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """Compute our aggregated objective. With vLLM, its importance weights multiply the token
        losses."""
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        width = inputs["completion_ids"].size(1)
        logprobs, entropy, *_ = self._get_per_token_logps_and_entropies(
            model, ids, attention, width, compute_entropy=True
        )
        if not torch.isfinite(logprobs.detach()[_mask(inputs)]).all():
            raise RunFailedError(
                f"step {self.state.global_step + 1}: the student's own log-probs are not finite; "
                "its weights are broken: start again with a lower learning_rate."
            )
        teacher, reference, old = (
            inputs[name].to(logprobs) if name in inputs else None for name in SCORED
        )
        weights = inputs.get("importance_sampling_ratio")
        batch = LossInputs(
            student_logprobs=logprobs,
            # TRL leaves out the old log-probs if they are the student's of this same pass.
            old_logprobs=logprobs.detach() if old is None else old,
            advantages=inputs["advantages"].to(logprobs),
            mask=_mask(inputs),
            teacher_logprobs=teacher,
            reference_logprobs=reference if self.beta else None,
            # [batch, 1] if vllm_importance_sampling_mode is for sequences
            rollout_weights=None if weights is None else weights.to(logprobs).expand_as(logprobs),
        )
        objective = self.args.objective_config
        knobs = objective.knobs_at(self.state.global_step)
        losses, stats = token_loss(objective.type, batch, knobs=knobs, kl_coef=self.beta)
        whole = self._denominator(inputs)
        self._record(batch, inputs, entropy, stats)
        return aggregate(losses, batch.trained, mode=self.args.aggregation, denominator=whole)

    def _denominator(self, inputs: dict[str, Any]) -> float:
        """Return TRL's denominator: that of the whole optimiser step, divided by the number of
        processes, since gradients are averaged over processes.

        `bnpo` divides by the tokens of each micro-batch. The others count the whole generation
        batch; of several optimiser steps on it, each divides by an equal share.
        """
        training = self.mode == "train"
        accumulation = self.current_gradient_accumulation_steps if training else 1
        if self.loss_type == "bnpo":
            return float(inputs["counted"].sum().clamp(min=1)) * accumulation
        steps = self.args.steps_per_generation if training else 1
        return float(inputs["denominator"]) / self.accelerator.num_processes * accumulation / steps

    def _record(
        self, batch: LossInputs, inputs: dict[str, Any], entropy: Tensor, stats: dict[str, Tensor]
    ) -> None:
        """Add our metrics of each optimiser step to TRL's."""
        trained = batch.trained & ~self._is_idle(inputs)[:, None]
        unknown = torch.full_like(batch.old_logprobs, torch.nan)
        sampled = inputs.get("sampling_per_token_logps", unknown)
        window = self.window
        window.add(replace(batch, mask=trained), entropy, sampled, stats)
        window.num_dropped += int((batch.mask & ~inputs["counted"]).sum())
        window.num_rows += len(trained)
        window.num_scored += int(trained.any(dim=1).sum())
        # One entry per optimiser step: micro-batches are collected until the last one.
        if self.mode == "eval" or self.accelerator.sync_gradients:
            whole = TokenStats()
            for part in gather_object([window]):
                whole.join(part)
            for key, value in whole.summary().items():
                self._metrics[self.mode][key].append(value)
            self.window = TokenStats()

    def _over_processes(self, numbers: Tensor) -> Tensor:
        """Return the sums of all processes' `numbers`."""
        summed: Any = self.accelerator.reduce(numbers, reduction="sum")
        return summed


def _mask(batch: dict[str, Any]) -> Tensor:
    """Return the completion tokens that are trained on, `[batch, token]`: those that the student
    wrote."""
    mask = batch["completion_mask"]
    return (mask * batch["tool_mask"] if "tool_mask" in batch else mask).bool()
