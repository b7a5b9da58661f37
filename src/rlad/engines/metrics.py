"""Compute the metrics of one step from per-token stats and rollouts. Every key is defined in
docs/metrics.md."""

import math
from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor

from rlad.objectives.inputs import LossInputs
from rlad.objectives.masks import per_token
from rlad.rollouts.roles import ROLES
from rlad.rollouts.types import Completion, Ending, Metrics, Rollout, RolloutGroup
from rlad.runs.statistics import ranked_pairs

_OF_THE_TEACHER = ("clamped", "log_ratio_to_teacher", "kl_to_teacher", "divergence_to_teacher")
"""Stats that have no meaning where the teacher is not used."""


class TokenStats:
    """The trained tokens of all micro-batches of a step, collected so that no average of averages
    is taken."""

    def __init__(self) -> None:
        self._columns: dict[str, list[Tensor]] = {}
        self.num_dropped = 0
        self.num_rows = 0
        self.num_scored = 0
        """The number of these completions that are trained on."""
        self.teacher_logprobs: dict[int, Tensor] = {}
        """The log-probs of sampled tokens, by rollout, of a teacher that is asked within the
        update."""

    def add(
        self,
        inputs: LossInputs,
        entropy: Tensor,
        sampler_logprobs: Tensor,
        stats: dict[str, Tensor],
    ) -> None:
        """Add the trained tokens of a micro-batch; every tensor is `[batch, token]`.

        `sampler_logprobs` are compared with those of the old policy, which is the policy that
        sampled.
        """
        trained = inputs.trained
        heard = trained & inputs.heard
        columns = stats | {
            "entropy": entropy,
            "advantages": per_token(inputs.advantages, inputs.mask),
            "mismatch": sampler_logprobs - inputs.old_logprobs,
        }
        for name, values in columns.items():
            chosen = heard if name in _OF_THE_TEACHER else trained
            self._columns.setdefault(name, []).append(values.detach()[chosen].float().cpu())

    def join(self, other: "TokenStats") -> None:
        """Add the tokens of another process."""
        for name, values in other._columns.items():
            self._columns.setdefault(name, []).extend(values)
        self.num_dropped += other.num_dropped
        self.num_rows += other.num_rows
        self.num_scored += other.num_scored

    @property
    def scored_share(self) -> float:
        return self.num_scored / self.num_rows if self.num_rows else 1.0

    def summary(self) -> Metrics:
        """Return the step's metrics of the objective, the teacher and the student."""
        column = {name: torch.cat(parts) for name, parts in self._columns.items()}
        metrics = {
            "objective/scored_completions/frac": self.scored_share,
            "objective/dropped_tokens/count": self.num_dropped,
            "objective/trained_tokens/count": len(column["entropy"]) if column else 0,
        }
        if not metrics["objective/trained_tokens/count"]:
            return metrics
        metrics["student/entropy/mean"] = _mean(column["entropy"])
        if "ratio" in column:
            metrics |= {
                "objective/ratio/mean": _mean(column["ratio"]),
                "objective/ratio/max": float(column["ratio"].max()),
            }
        if "gated_positive" in column:
            positive = column["advantages"] > 0
            negative = column["advantages"] < 0
            metrics["objective/gated_positive/frac"] = _mean(column["gated_positive"][positive])
            metrics["objective/gated_negative/frac"] = _mean(column["gated_negative"][negative])
        if "clamped" in column:
            metrics["objective/clamped/frac"] = _mean(column["clamped"])
        if len(column.get("log_ratio_to_teacher", ())):
            values = column["log_ratio_to_teacher"]
            metrics["teacher/log_ratio/mean"] = _mean(values)
            for name, share in (("q05", 0.05), ("q50", 0.5), ("q95", 0.95)):
                # `torch.quantile` refuses more than 2^24 values; at that size an order statistic is
                # just as accurate.
                metrics[f"teacher/log_ratio/{name}"] = float(
                    values.kthvalue(1 + round(share * (len(values) - 1))).values
                )
        for name, key in (
            ("advantage_weight", "objective/advantage_weight/mean"),
            ("kl_to_teacher", "teacher/kl/mean"),
            ("divergence_to_teacher", "teacher/divergence/mean"),
            ("importance_weight", "objective/importance_weight/mean"),
            ("pointwise_clipped", "objective/pointwise_clipped/frac"),
            ("kl_to_reference", "reference/kl/mean"),
        ):
            if name in column:
                metrics[key] = _mean(column[name])
        return metrics | _role_metrics(column) | _sampler_metrics(column)


def _role_metrics(column: dict[str, Tensor]) -> Metrics:
    """Measure the evidence and the weights of the tokens of each role."""
    if "role" not in column:
        return {}
    names = {
        "perception": ("objective/perception_evidence/mean", "objective/perception_weight/mean"),
        "reasoning": ("objective/reasoning_evidence/mean", "objective/reasoning_weight/mean"),
    }
    metrics = {}
    for role, number in ROLES.items():
        chosen = (column["role"] == number) & column["role_evidence"].isfinite()
        if chosen.any():
            evidence, weight = names[role]
            metrics[evidence] = _mean(column["role_evidence"][chosen])
            metrics[weight] = _mean(column["advantage_weight"][chosen])
    return metrics


def _sampler_metrics(column: dict[str, Tensor]) -> Metrics:
    """Compare the sampler's log-probs with those of the old policy."""
    mismatch = column["mismatch"]
    mismatch = mismatch[~mismatch.isnan()]  # a sampler may leave tokens without a log-prob
    if not len(mismatch):
        return {}
    metrics = {
        "sampler/mismatch/mean": _mean(mismatch.abs()),
        "sampler/mismatch/max": float(mismatch.abs().max()),
    }
    if "rollout_weight_bounded" in column:
        # k3 estimate: the tokens come from the sampler, and log(πold / πrollout) is -mismatch.
        metrics["sampler/kl/mean"] = _mean(torch.expm1(-mismatch) + mismatch)
        metrics["sampler/bounded_weights/frac"] = _mean(column["rollout_weight_bounded"])
    return metrics


def rollout_metrics(groups: Sequence[RolloutGroup]) -> Metrics:
    """Measure rewards, verdicts and lengths of the rollouts of one step."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    verdicts = [rollout.verdict for rollout in rollouts]
    judged = [[r.reward for r in g.rollouts if r.verdict != "cannot_judge"] for g in groups]
    rewards = torch.tensor([reward for group in judged for reward in group])
    lengths = torch.tensor([float(r.completion.num_actions) for r in rollouts])
    return {
        **({"reward/mean": _mean(rewards)} if len(rewards) else {}),
        "reward/correct/frac": verdicts.count("correct") / len(rollouts),
        "reward/cannot_judge/frac": verdicts.count("cannot_judge") / len(rollouts),
        "reward/zero_variance/frac": sum(len(set(group)) < 2 for group in judged) / len(groups),
        "rollout/completion_tokens/mean": _mean(lengths),
        "rollout/completion_tokens/max": float(lengths.max()),
        "rollout/truncated/frac": sum(r.completion.is_truncated for r in rollouts) / len(rollouts),
        "rollout/repeated/frac": sum(map(_repeated_share, groups)) / len(groups),
        **_episode_metrics(rollouts),
    }


def _episode_metrics(rollouts: Sequence[Rollout]) -> Metrics:
    """Measure turns, endings and the environment's tokens; nothing for single-turn completions."""
    completions = [rollout.completion for rollout in rollouts]
    endings = [completion.ending for completion in completions]
    if not any(endings):
        return {}
    num_turns = [len(rollout.turns) for rollout in rollouts]
    num_read = [len(one.token_ids) - one.num_actions for one in completions]
    return {
        "rollout/turns/mean": sum(num_turns) / len(rollouts),
        "rollout/turns/max": float(max(num_turns)),
        "rollout/environment_tokens/mean": sum(num_read) / len(rollouts),
        **{
            f"rollout/ended_by_{name}/frac": endings.count(name) / len(rollouts)
            for name in get_args(Ending)
        },
    }


def ranking_metrics(groups: Sequence[RolloutGroup], teacher_logprobs: Sequence[Tensor]) -> Metrics:
    """Measure whether the teacher's mean log-prob ranks correct completions above wrong ones.
    `teacher_logprobs` are by rollout, empty where the teacher was not asked."""
    values = iter(teacher_logprobs)
    scores: list[list[float]] = []
    is_correct: list[list[bool]] = []
    for group in groups:
        judged = [
            (_mean_of_actions(logprobs, rollout.completion), rollout.verdict == "correct")
            for rollout, logprobs in zip(group.rollouts, values, strict=False)
            if rollout.verdict != "cannot_judge"
        ]
        # An empty mean, or one with a missing token, is not a score.
        judged = [(score, correct) for score, correct in judged if math.isfinite(score)]
        scores.append([score for score, _ in judged])
        is_correct.append([correct for _, correct in judged])
    wins, pairs = ranked_pairs(scores, is_correct)
    metrics = {}
    if pairs.trace():
        metrics["teacher/ranking/pairwise"] = float(wins.trace() / pairs.trace())
    if pairs.sum():
        metrics["teacher/ranking/auc"] = float(wins.sum() / pairs.sum())
    return metrics


def _mean_of_actions(logprobs: Tensor, completion: Completion) -> float:
    """Return the mean over the tokens that the model wrote; NaN if there are no log-probs."""
    if completion.actions is not None and len(logprobs):
        logprobs = logprobs[torch.tensor(completion.actions)]
    return float(logprobs.mean())


def _repeated_share(group: RolloutGroup) -> float:
    """Return the share of repeated rollouts among those after the first: 1 if all rollouts of the
    group have the same tokens."""
    num_rollouts = len(group.rollouts)
    num_different = len({r.completion.token_ids for r in group.rollouts})
    return (num_rollouts - num_different) / max(num_rollouts - 1, 1)


def _mean(values: Tensor) -> float:
    """Return the mean of a column, 0 if it is empty."""
    return float(values.double().mean()) if len(values) else 0.0
