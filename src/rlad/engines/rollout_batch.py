"""The data of one rollout batch in the native engine, from sampling to the last step on it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlad.objectives.inputs import LossInputs
from rlad.rollouts.types import Completion, Metrics, Rollout, RolloutGroup
from rlad.scoring.scorer import CompletionScores
from rlad.tasks import Verdict
from rlad.teachers.base import Teacher, TeacherRequest

TokenIds = tuple[int, ...]


@dataclass(slots=True)
class RolloutBatch:
    """The rollouts of one batch of prompts, with their scores.

    Lists and tensors are by rollout, group after group. Scores have the shape `[completion
    tokens]`, and are empty for rollouts that do not train.
    """

    index: int
    groups: Sequence[RolloutGroup]
    advantages: Tensor
    teacher_logprobs: list[Tensor] | None = None
    reference_logprobs: list[Tensor] | None = None
    old_logprobs: list[Tensor] | None = None
    """the student's log-probs at the first step on the batch; None: computed in the only step"""
    token_advantages: list[Tensor] | None = None
    """advantages that an objective computes from the teacher; they replace `advantages`"""
    role_evidence: list[Tensor] | None = None
    """for an objective that weights tokens by their role"""
    roles: list[Tensor] | None = None
    """role of each token, as numbered in `rlad.rollouts.roles`"""
    spoken_share: float = 1.0
    """share of rollouts on which the teacher is used, among those that could train with it"""
    seconds: Metrics = field(default_factory=dict)
    counts: Metrics = field(default_factory=dict)
    skills: dict[str, Any] | None = None
    """skills that its teacher was shown, and skills learnt from it, for `skills.jsonl`"""

    group_size: int = field(init=False)
    rollouts: list[Rollout] = field(init=False)
    prompts: list[TokenIds] = field(init=False)
    completions: list[TokenIds] = field(init=False)
    actions: list[Tensor] = field(init=False)
    """bool `[token]`: the tokens of each completion that the model wrote; only these train"""
    judged: Tensor = field(init=False)
    """bool"""
    is_correct: Tensor = field(init=False)
    """bool"""
    counted: Tensor = field(init=False)
    """bool: the rollouts that the denominator of the loss counts"""
    trains: Tensor = field(init=False)
    """bool: those of them that can contribute to the gradient; only these are scored"""
    teacher_speaks: Tensor = field(init=False)
    """bool: the rollouts on which the teacher is used"""

    def __post_init__(self) -> None:
        self.group_size = len(self.groups[0].rollouts)
        self.rollouts = [rollout for group in self.groups for rollout in group.rollouts]
        self.prompts = [group.prompt_token_ids for group in self.groups for _ in group.rollouts]
        self.completions = [rollout.completion.token_ids for rollout in self.rollouts]
        self.actions = [action_mask(rollout.completion) for rollout in self.rollouts]
        self.judged = torch.tensor([r.verdict != Verdict.CANNOT_JUDGE for r in self.rollouts])
        self.is_correct = torch.tensor([r.verdict == Verdict.CORRECT for r in self.rollouts])
        self.counted = self.judged
        self.trains = self.judged
        self.teacher_speaks = torch.ones_like(self.judged)

    def choose_what_trains(
        self,
        objective: Any,
        *,
        step: int,
        has_leash: bool,
        can_read: Callable[[TokenIds], bool] = lambda completion: True,
        teacher: Teacher | None = None,
    ) -> None:
        """Leave out rollouts that the objective's loss does not use, and those with advantage 0
        that contribute exactly nothing to the gradient.

        `step` is the first step on the batch, whose annealed settings decide. With a KL leash to
        the reference every token contributes. `can_read` tells whether the student can read a
        completion that the teacher has written. `teacher` is the teacher of these rollouts.
        """
        self.counted = {
            "judged": self.judged,
            "correct": self.is_correct,
            "all": torch.ones_like(self.judged),
        }[objective.counted_rollouts]
        if objective.written_by == "teacher":
            # Its vocabulary may be padded further, and it may write a placeholder of pictures.
            self.counted = self.counted & torch.tensor(list(map(can_read, self.completions)))
        self.trains = self.counted
        if objective.zero_advantage_is_zero_gradient and not has_leash:
            self.trains = self.counted & (self.advantages != 0)
        if teacher is not None:
            self._choose_where_it_speaks(teacher, objective, step)

    def _choose_where_it_speaks(self, teacher: Teacher, objective: Any, step: int) -> None:
        """Find the rollouts on which the teacher is used: those that the objective selects and that
        the teacher can score."""
        solved = self.is_correct.view(-1, self.group_size).any(dim=1)
        wanted = {
            "all": torch.ones_like(self.judged),
            "positive": self.advantages > 0,
            "wrong": ~self.is_correct,
            "failed_groups": ~solved.repeat_interleave(self.group_size),
        }[objective.asks_teacher_on]
        self.teacher_speaks = wanted
        for i in (self.trains & wanted).nonzero().flatten().tolist():
            self.teacher_speaks[i] = teacher.speaks(self._teacher_request(i))
        trained = self.teacher_speaks[self.trains]
        self.spoken_share = float(trained.double().mean()) if len(trained) else 1.0
        if not objective.trains_without_teacher(step):
            self.counted = self.counted & self.teacher_speaks
            self.trains = self.trains & self.teacher_speaks

    def make_token_advantages(self, make: Callable[..., Tensor]) -> None:
        """Fill `token_advantages` from the log-probs of old policy and teacher, by a function such
        as `rlad.objectives.topd.topd_advantages`."""
        assert self.old_logprobs and self.teacher_logprobs
        lengths = [len(values) for values in self.old_logprobs]
        shape = (len(lengths), max(map(len, self.completions)))
        like = self.old_logprobs[0].new_empty(shape)
        trained = [actions[:n] for actions, n in zip(self.actions, lengths, strict=True)]
        mask = padded(trained, like).bool()
        advantages = make(
            old_logprobs=padded(self.old_logprobs, like),
            teacher_logprobs=padded(self.teacher_logprobs, like),
            mask=mask,
            group_size=self.group_size,
        )
        self.token_advantages = [row[:n] for row, n in zip(advantages, lengths, strict=True)]

    @property
    def training_rows(self) -> list[int]:
        return self.trains.nonzero().flatten().tolist()

    @property
    def teacher_rows(self) -> list[int]:
        """Return the rollouts that train and on which the teacher is used."""
        return (self.trains & self.teacher_speaks).nonzero().flatten().tolist()

    def num_actions(self, rows: Sequence[int]) -> int:
        """Count the tokens that the model wrote in some rollouts."""
        return sum(int(self.actions[i].sum()) for i in rows)

    def by_rollout(self, scores: Sequence[Tensor], rows: Sequence[int]) -> list[Tensor]:
        """Return the scores of the rollouts `rows` in a list over all rollouts."""
        empty = scores[0][:0] if scores else torch.empty(0)
        results = [empty] * len(self.rollouts)
        for i, values in zip(rows, scores, strict=True):
            # Missing values filled with zeros would mean that the teacher is certain of a token.
            assert len(values) == len(self.completions[i]), "a score for each token, NaN for none"
            results[i] = values
        return results

    def sequences(self, rows: Sequence[int]) -> tuple[list[Sequence[int]], list[Sequence[int]]]:
        """Return prompts and completions of some rollouts."""
        return [self.prompts[i] for i in rows], [self.completions[i] for i in rows]

    def counted_tokens(self, wanted: Sequence[int]) -> dict[int, Tensor]:
        """Return the model's tokens with finite scores, bool `[token]`, for each counted rollout
        among `wanted`.

        Rows that were not scored, because they contribute nothing or the teacher is not used on
        them, count in full.
        """
        counted = self.counted.tolist()
        result = {}
        for i in (i for i in wanted if counted[i]):
            tokens = self.actions[i].clone()
            for values in (self.teacher_logprobs, self.reference_logprobs, self.old_logprobs):
                if values is not None and len(values[i]):
                    tokens &= torch.isfinite(values[i])
            result[i] = tokens
        return result

    def loss_inputs(self, part: Sequence[int], scores: CompletionScores) -> LossInputs:
        """Return the tensors of the rollouts `part`, given the student's scores of them."""
        student = scores.logprobs
        rows = torch.tensor(part)

        def chosen(values: list[Tensor] | None) -> Tensor | None:
            return None if values is None else padded([values[i] for i in part], student)

        # In the only step on a batch the student is the old policy.
        old = chosen(self.old_logprobs)
        token_advantages = chosen(self.token_advantages)
        if token_advantages is None:
            advantages = self.advantages[rows].to(student)
        else:
            advantages = token_advantages
        speaks = self.teacher_speaks[rows]
        return LossInputs(
            student_logprobs=student,
            old_logprobs=student.detach() if old is None else old,
            advantages=advantages,
            mask=scores.mask & padded([self.actions[i] for i in part], scores.mask),
            teacher_logprobs=chosen(self.teacher_logprobs),
            reference_logprobs=chosen(self.reference_logprobs),
            role_evidence=chosen(self.role_evidence),
            divergence_to_teacher=scores.divergence,
            teacher_speaks=None if speaks.all() else speaks.to(student.device),
        )

    def teacher_requests(self, rows: Sequence[int] | None = None) -> list[TeacherRequest]:
        """Make the requests to a teacher about some rollouts, by default `teacher_rows`."""
        return [self._teacher_request(i) for i in (self.teacher_rows if rows is None else rows)]

    def _teacher_request(self, row: int) -> TeacherRequest:
        number, place = divmod(row, self.group_size)
        return teacher_request(self.groups[number], place)


def teacher_request(group: RolloutGroup, place: int) -> TeacherRequest:
    """Make the request to a teacher about one rollout of a group."""
    rollout = group.rollouts[place]
    # A privileged teacher may be shown other rollouts, but never the one that it scores.
    return TeacherRequest(
        group.prompt_token_ids,
        rollout.completion.token_ids,
        group.problem,
        rollout,
        peers=(*group.rollouts[:place], *group.rollouts[place + 1 :]),
        skill=group.skill,
        actions=rollout.completion.actions,
    )


def action_mask(completion: Completion) -> Tensor:
    """Return which tokens of a completion the model wrote, bool `[token]`."""
    if completion.actions is None:
        return torch.ones(len(completion.token_ids), dtype=torch.bool)
    return torch.tensor(completion.actions)


def padded(rows: Sequence[Tensor], like: Tensor) -> Tensor:
    """Pad rows `[length]` with 0 to one tensor with shape, dtype and device of `like`."""
    values = pad_sequence(list(rows), batch_first=True).to(like)
    # Rows on which the teacher is not used are empty, even those of the longest completions.
    return torch.nn.functional.pad(values, (0, like.shape[1] - values.shape[1]))
