"""Compare the student's distributions of a micro-batch with the teacher's, for objectives that need
more than the sampled tokens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlad.config.types import Support
from rlad.engines.rollout_batch import RolloutBatch
from rlad.objectives.divergences import Divergence, num_clipped
from rlad.scoring.columns import TokenColumns
from rlad.scoring.distributions import Distributions, TokenDistributions
from rlad.scoring.token_divergence import smaller_tile, token_divergence
from rlad.scoring.top_k import (
    column_divergence,
    column_logprobs,
    likeliest,
    top_k_divergence,
)
from rlad.teachers.base import Teacher, TeacherRequest


@dataclass(slots=True)
class Comparison:
    """The divergence to a teacher that is asked within the update."""

    teacher: Teacher
    measure: Divergence
    support: Support
    top_k: int
    bound: float | None = None
    """bound of the terms of `measure`; only with the support "full\""""
    num_clipped: Tensor | None = None
    """number of terms at the bound, for each token of the last micro-batch"""
    teacher_logprobs: list[Tensor] | None = None
    """the teacher's log-probs of the last micro-batch's sampled tokens, by rollout, NaN where it
    gives nothing; only from a teacher that gives whole distributions"""

    def of(self, batch: RolloutBatch, part: Sequence[int]) -> Callable[[Distributions], Tensor]:
        """Return a function from the student's distributions to the divergence at each token of the
        rollouts `part`; NaN where the teacher gives nothing."""
        asked = _Asked(batch, part)
        if self.teacher.gives_distributions:
            whole = asked.placed(self.teacher.distributions(asked.requests))
            return partial(self._from_distributions, asked, whole)
        if self.support == "teacher_top_k":
            columns = asked.placed(self.teacher.columns(asked.requests, top_k=self.top_k))
            return partial(self._from_columns, columns)
        return partial(self._from_own_columns, asked)

    def _from_distributions(
        self, asked: "_Asked", teacher: TokenDistributions, student: Distributions
    ) -> Tensor:
        sampled = asked.token_ids[:, None].to(student.device)
        logprobs, _ = column_logprobs(teacher, sampled, tile=smaller_tile(student))
        self.teacher_logprobs = list(logprobs[:, 0].cpu().split(asked.lengths))
        if self.bound is not None:
            with torch.no_grad():
                self.num_clipped = token_divergence(student, teacher, self._count)
        if self.support == "full":
            return token_divergence(student, teacher, self.measure)
        return top_k_divergence(
            student,
            teacher,
            self.measure,
            top_k=self.top_k,
            chosen_by=student if self.support == "student_top_k" else teacher,
        )

    def _from_own_columns(self, asked: "_Asked", student: Distributions) -> Tensor:
        """Ask about the student's own most likely tokens, which are known only now."""
        ids = likeliest(student, self.top_k, tile=smaller_tile(student)).cpu()
        columns = self.teacher.columns(asked.requests, top_k=self.top_k, ids=ids[asked.places])
        return self._from_columns(TokenColumns(ids, asked.placed(columns).logprobs), student)

    def _from_columns(self, columns: TokenColumns, student: Distributions) -> Tensor:
        ids = columns.ids.to(student.device)
        logprobs = columns.logprobs.to(student.device)
        return column_divergence(student, ids, logprobs, self.measure)

    @property
    def _count(self) -> Divergence:
        assert self.bound is not None
        return partial(num_clipped, divergence=self.measure, bound=self.bound)


class _Asked:
    """The rollouts among `part` that the teacher is asked about."""

    def __init__(self, batch: RolloutBatch, part: Sequence[int]):
        speaks = batch.teacher_speaks[list(part)]
        rows = [i for i, is_asked in zip(part, speaks.tolist(), strict=True) if is_asked]
        self.requests: list[TeacherRequest] = batch.teacher_requests(rows)
        self.lengths = [len(batch.completions[i]) for i in part]
        token_ids = [token for i in part for token in batch.completions[i]]
        self.token_ids = torch.tensor(token_ids, dtype=torch.int64)
        """Tokens of the rollouts `part`, one rollout after the other."""
        self.places = speaks.repeat_interleave(torch.tensor(self.lengths)).nonzero().flatten()
        """Positions among them of those that the teacher is asked about."""
        self.num_tokens = len(self.token_ids)

    def placed(self, found: Any) -> Any:
        """Put the values at those positions, and none at the tokens of other rollouts."""
        if len(self.places) == self.num_tokens:
            return found
        return found.placed(self.places, self.num_tokens)
