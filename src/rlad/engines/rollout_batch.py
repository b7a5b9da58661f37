"""What the native engine knows of one batch of prompts between sampling and the last step on it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlad.errors import UserError
from rlad.rollouts.types import Metrics, Rollout, RolloutGroup
from rlad.tasks import Task, Verdict
from rlad.teachers.base import TeacherRequest


@dataclass(slots=True)
class RolloutBatch:
    """The rollouts of one batch of prompts and what was scored on them; lists are by rollout, group
    after group."""

    index: int
    groups: list[RolloutGroup]
    advantages: Tensor
    teacher_logprobs: list[Tensor] | None = None
    reference_logprobs: list[Tensor] | None = None
    old_logprobs: list[Tensor] | None = None
    """None: the student has not moved since it sampled, so they are its own log-probs"""
    token_advantages: list[Tensor] | None = None
    """of an objective that makes them from the teacher; they take the place of `advantages`"""
    seconds: Metrics = field(default_factory=dict)
    counts: Metrics = field(default_factory=dict)
    imitation: dict[int, Any] = field(default_factory=dict)
    """rollout -> what the last step did with its tokens (`rlad.engines.imitation`), of the first
    group of that step"""

    @property
    def rollouts(self) -> list[Rollout]:
        return [rollout for group in self.groups for rollout in group.rollouts]

    @property
    def prompts(self) -> list[tuple[int, ...]]:
        return [group.prompt_token_ids for group in self.groups for _ in group.rollouts]

    @property
    def completions(self) -> list[tuple[int, ...]]:
        return [rollout.completion.token_ids for rollout in self.rollouts]


def teacher_requests(
    batch: RolloutBatch, rows: Sequence[int], task: Task, *, seed: int
) -> list[TeacherRequest]:
    """What the teacher is asked for some rollouts: tokens, the problem, and a correct completion of
    another rollout."""
    size = len(batch.groups[0].rollouts)
    problems = [task.problem("train", group.problem_index, seed=seed) for group in batch.groups]
    requests = []
    for i in rows:
        group, rollouts = batch.groups[i // size], batch.groups[i // size].rollouts
        peers = (
            r.text for j, r in enumerate(rollouts) if j != i % size and r.verdict == Verdict.CORRECT
        )
        completion = rollouts[i % size].completion.token_ids
        requests.append(
            TeacherRequest(
                group.prompt_token_ids, completion, problems[i // size], next(peers, None)
            )
        )
    return requests


def padded(rows: Sequence[Tensor], like: Tensor) -> Tensor:
    """Rows `[length]` as one tensor `[row, longest length]` of the dtype and device of `like`, 0
    behind each row's end."""
    return pad_sequence(list(rows), batch_first=True).to(like)


def score_rows(
    score: Callable[..., list[Tensor]], batch: RolloutBatch, rows: Sequence[int]
) -> list[Tensor]:
    """`score(prompts, completions)` of some rollouts of a batch, in a list over all of them; empty
    tensors for the others."""
    prompts, completions = batch.prompts, batch.completions
    return by_rollout(
        score([prompts[i] for i in rows], [completions[i] for i in rows]), batch, rows
    )


def by_rollout(values: Sequence[Tensor], batch: RolloutBatch, rows: Sequence[int]) -> list[Tensor]:
    """The scores of the rollouts `rows` in a list over all rollouts of the batch; empty tensors for
    the others.

    Raises `UserError` when a completion did not get one score per token.
    """
    completions, results = batch.completions, [torch.empty(0)] * len(batch.rollouts)
    for i, value in zip(rows, values, strict=True):
        if len(value) != len(completions[i]):
            raise UserError(
                f"rollout {i} has {len(completions[i])} tokens but {len(value)} log-probs came "
                "back for it; "
                "a teacher must give one for each token, NaN where it has none."
            )
        results[i] = value
    return results
