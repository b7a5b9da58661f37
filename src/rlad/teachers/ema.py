"""The student's exponential moving average as its teacher: self-distillation.

teacher_0 = the initial student
teacher += update_rate * (student - teacher)    after each optimiser step
"""

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rlad.config.teacher import EMATeacherConfig
from rlad.errors import UserError
from rlad.findings import Finding
from rlad.models.loading import LanguageModel
from rlad.scoring.scorer import Scorer
from rlad.teachers.base import Setting
from rlad.teachers.local import ScoringTeacher


class EMATeacher(ScoringTeacher):
    """A float32 copy of the student's trained weights that follows them; with update_rate = 1 none.

    Weights that are not trained, as those below a LoRA adapter, are shared with the student.
    """

    def __init__(self, student: LanguageModel, *, name: str, update_rate: float, **scoring: Any):
        """`scoring` is what a `Scorer` takes beside the model."""
        self.update_rate = update_rate
        self._pairs: Mapping[str, tuple[Tensor, Tensor]] = {}
        # With rate 1 the average is the student itself: its own weights score, and nothing is
        # stored.
        if update_rate < 1:
            student, self._pairs = _copy(student)
        identity = f"the moving average of {name} (update rate {update_rate!r})"
        super().__init__(identity, Scorer(student, **scoring))

    @torch.no_grad()
    def after_step(self) -> None:
        for mine, students in self._pairs.values():
            mine.lerp_(students, self.update_rate)

    def state(self) -> dict[str, Tensor]:
        """The averaged weights themselves, no copies; empty where the student's own are used."""
        return {name: mine.detach() for name, (mine, _) in self._pairs.items()}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Raises `UserError` unless all averaged weights are there."""
        # A checkpoint of another model or adapter would fit in part; then the teacher would be a
        # mixture.
        shapes = {name: mine.shape for name, (mine, _) in self._pairs.items()}
        if {name: tensor.shape for name, tensor in state.items()} != shapes:
            raise UserError(f"it does not hold the {len(shapes)} weights of {self.identity}.")
        for name, (mine, _) in self._pairs.items():
            mine.copy_(state[name])


def _copy(student: LanguageModel) -> tuple[LanguageModel, Mapping[str, tuple[Tensor, Tensor]]]:
    """A student that shares the weights that are not trained, and by name each copy with its
    source."""
    trained = {
        name: weight for name, weight in student.model.named_parameters() if weight.requires_grad
    }
    # deepcopy takes what its memo already holds as it is: frozen weights stay the student's own.
    model = copy.deepcopy(
        student.model, {id(w): w for w in student.model.parameters() if not w.requires_grad}
    )
    # A name whose weight is tied to another is listed once, so each weight moves once a step.
    copies = dict(model.named_parameters())
    pairs = {name: (copies[name].requires_grad_(False), weight) for name, weight in trained.items()}
    return replace(student, model=model.eval()), pairs


def check_teacher(settings: EMATeacherConfig, setting: Setting) -> list[Finding]:
    if settings.update_rate == 1 and setting.config.teacher == settings:
        message = (
            "the student is its own teacher and sees the same prompt, so it learns nothing from "
            "it; wrap it in a teacher of type 'privileged', or lower update_rate."
        )
        return [Finding("warning", "moving average", message)]
    return [Finding("ok", "moving average", f"{settings.title} of the same tokenizer and context")]


def make_teacher(settings: EMATeacherConfig, setting: Setting) -> EMATeacher:
    assert setting.student is not None
    return EMATeacher(
        setting.student,
        name=setting.config.student.model,
        update_rate=settings.update_rate,
        **setting.scoring(settings.tokens_per_batch),
    )
