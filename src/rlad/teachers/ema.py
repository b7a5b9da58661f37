"""The exponential moving average of the student as its teacher: self-distillation.

teacher_0 = the initial student
teacher += update_rate * (student - teacher)    after each optimiser step, or each n rollout batches
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rlad.config.teacher import EMATeacherConfig
from rlad.errors import UserError
from rlad.findings import Finding
from rlad.models.loading import LanguageModel
from rlad.models.student import load_reference
from rlad.scoring.distributions import TokenDistributions
from rlad.scoring.mixtures import GeometricMixture
from rlad.scoring.scorer import Scorer
from rlad.scoring.tiles import tile_shape
from rlad.scoring.top_k import column_logprobs
from rlad.teachers.adapter import AdapterScorer
from rlad.teachers.base import Setting, TeacherRequest
from rlad.teachers.local import ScoringTeacher


class EMATeacher(ScoringTeacher):
    """A float32 copy of the student's trained weights that follows them. With update_rate = 1 after
    each step there is no copy.

    Weights that are not trained, such as those under a LoRA adapter, are shared with the student.
    """

    def __init__(
        self,
        student: LanguageModel,
        *,
        name: str,
        update_rate: float,
        every_batches: int | None = None,
        **scoring: Any,
    ):
        """Take in `scoring` the arguments of a `Scorer` besides the model."""
        self.update_rate = update_rate
        self.every_batches = every_batches
        self._pairs: Mapping[str, tuple[Tensor, Tensor]] = {}
        # With rate 1 the average is the student itself: the student's weights score, and nothing is
        # stored.
        if update_rate < 1 or every_batches is not None:
            student, self._pairs = _copy(student)
        every = f" every {every_batches} rollout batches" if every_batches else ""
        identity = f"the moving average of {name} (update rate {update_rate!r}{every})"
        super().__init__(identity, Scorer(student, **scoring))

    def after_step(self) -> None:
        if self.every_batches is None:
            self._follow()

    def after_batch(self, index: int, *, is_skipped: bool = False) -> None:
        # Batches are counted by their index, so that a resumed run continues the count. A skipped
        # step does not change the student, but other batches since the last update did.
        every = self.every_batches
        if every is not None and (index + 1) % every == 0 and not (is_skipped and every == 1):
            self._follow()

    @torch.no_grad()
    def _follow(self) -> None:
        for mine, students in self._pairs.values():
            mine.lerp_(students, self.update_rate)

    def state(self) -> dict[str, Tensor]:
        """Return the averaged weights, not copied; empty if the student's own weights are used."""
        return {name: mine.detach() for name, (mine, _) in self._pairs.items()}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Load the averaged weights. Raises `UserError` unless all of them are there."""
        # A checkpoint of another model or adapter might fit in part; the teacher would then be a
        # mixture of both.
        shapes = {name: mine.shape for name, (mine, _) in self._pairs.items()}
        if {name: tensor.shape for name, tensor in state.items()} != shapes:
            raise UserError(f"it does not have the {len(shapes)} weights of {self.identity}.")
        for name, (mine, _) in self._pairs.items():
            mine.copy_(state[name])


class TrustRegionTeacher(ScoringTeacher):
    """A teacher π0^(1 - a) π^a, normalised at each token, which stays near the initial student."""

    def __init__(self, present: EMATeacher, initial: Scorer, *, share: float):
        """Mix the average and the initial student; `share` is a, the weight of the average.

        Raises `UserError` if the models' logits cannot be computed from their hidden states.
        """
        if initial.head is None or present.scorer.head is None:
            raise UserError(
                f"teacher.trust_region needs a model whose logits are a linear function of its "
                f"hidden states, and {present.identity} has others; leave it out."
            )
        super().__init__(
            f"{present.identity}, {share!r} of it with the initial student", present.scorer
        )
        self.inner = {"": present}
        self.initial = initial
        self.share = share

    def distributions(self, requests: Sequence[TeacherRequest]) -> TokenDistributions:
        sequences = [one.prompt for one in requests], [one.completion for one in requests]
        parts = [scorer.distributions(*sequences) for scorer in (self.initial, self.scorer)]
        return GeometricMixture(parts, [1 - self.share, self.share])

    def logprobs(self, requests: Sequence[TeacherRequest]) -> list[Tensor]:
        results = [torch.empty(0)] * len(requests)
        sequences = [one.prompt for one in requests], [one.completion for one in requests]
        for rows in self.scorer.batches(*sequences):
            self.scorer.before_work()
            wanted = [requests[i] for i in rows]
            found = self.distributions(wanted)
            ids = [token for one in wanted for token in one.completion]
            # One token's log-prob needs the normalisation over the whole vocabulary.
            columns, _ = column_logprobs(
                found,
                torch.tensor(ids, device=found.device)[:, None],
                tile=tile_shape(found.device.type, found.num_tokens, found.vocabulary),
            )
            lengths = [len(one.completion) for one in wanted]
            for i, values in zip(rows, columns[:, 0].cpu().split(lengths), strict=True):
                results[i] = values
        return results


def _copy(student: LanguageModel) -> tuple[LanguageModel, Mapping[str, tuple[Tensor, Tensor]]]:
    """Copy a student, except for weights that are not trained. Also return each copied weight with
    its source, by name."""
    trained = {
        name: weight for name, weight in student.model.named_parameters() if weight.requires_grad
    }
    # deepcopy reuses what is in its memo already, so frozen weights stay the student's own.
    model = copy.deepcopy(
        student.model, {id(w): w for w in student.model.parameters() if not w.requires_grad}
    )
    # Tied weights are listed once, so that each is updated once per step.
    copies = dict(model.named_parameters())
    pairs = {name: (copies[name].requires_grad_(False), weight) for name, weight in trained.items()}
    return replace(student, model=model.eval()), pairs


def check_teacher(settings: EMATeacherConfig, setting: Setting) -> list[Finding]:
    is_mixed = settings.trust_region is not None
    if settings.is_student and not is_mixed and setting.config.teacher == settings:
        message = (
            "the student is its own teacher and sees the same prompt, so it learns nothing from "
            "it; wrap it in a teacher of type 'privileged', or lower update_rate."
        )
        return [Finding("warning", "moving average", message)]
    return [Finding("ok", "moving average", f"{settings.title} of the same tokenizer and context")]


def make_teacher(settings: EMATeacherConfig, setting: Setting) -> EMATeacher | TrustRegionTeacher:
    student = setting.student
    assert student is not None
    scoring = setting.scoring(settings.tokens_per_batch)
    average = EMATeacher(
        student,
        name=setting.config.student.model,
        update_rate=settings.update_rate,
        every_batches=settings.every_batches,
        **scoring,
    )
    if settings.trust_region is None:
        return average
    reference = load_reference(setting.config, student)
    initial = (
        AdapterScorer(student, adapter=None, **scoring)
        if reference is student
        else Scorer(reference, **scoring)
    )
    return TrustRegionTeacher(average, initial, share=settings.trust_region)
