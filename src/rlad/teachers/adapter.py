"""The student's base model as its teacher, with another LoRA adapter or with none.

Both share the base weights. While the teacher scores, the student's adapter is off. The teacher's
weights are never trainable.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from rlad.config.teacher import AdapterTeacherConfig
from rlad.errors import UserError
from rlad.findings import Finding
from rlad.models.adapters import (
    adapter_names,
    add_frozen_adapter,
    only_adapter,
    require_shareable,
)
from rlad.models.files import base_model, has_tokenizer, is_adapter, resolvable
from rlad.models.loading import LanguageModel, remove_dropout
from rlad.models.without_weights import load_model_config, load_tokenizer
from rlad.scoring.distributions import Distributions
from rlad.scoring.scorer import Scorer, TokenIds
from rlad.teachers.base import Setting
from rlad.teachers.compatibility import compare_tokenizers
from rlad.teachers.fingerprint import weights_fingerprint
from rlad.teachers.local import ScoringTeacher


class AdapterScorer(Scorer):
    """A scorer with a student's base model and the adapter `adapter` (None: no adapter)."""

    def __init__(self, student: LanguageModel, *, adapter: str | None, **scoring: Any):
        super().__init__(student, **scoring)
        self.adapter = adapter

    def score(self, prompts: Sequence[TokenIds], completions: Sequence[TokenIds]) -> list[Tensor]:
        with only_adapter(self.model, self.adapter):
            return super().score(prompts, completions)

    def distributions(
        self, prompts: Sequence[TokenIds], completions: Sequence[TokenIds]
    ) -> Distributions:
        # An adapter never changes the output layer, only the hidden states.
        with only_adapter(self.model, self.adapter):
            return super().distributions(prompts, completions)


class AdapterTeacher(ScoringTeacher):
    """A teacher with the student's own base weights and the adapter in `folder` (None: without
    adapter)."""

    def __init__(self, student: LanguageModel, *, base: str, folder: str | None, **scoring: Any):
        """Take in `scoring` the arguments of a `Scorer` besides the model."""
        self._student = student
        self._adapter = None if folder is None else add_frozen_adapter(student.model, folder)
        remove_dropout(student.model)
        super().__init__(
            f"{base} without adapter" if folder is None else f"{base} with adapter {folder}",
            AdapterScorer(student, adapter=self._adapter, **scoring),
        )

    @property
    def fingerprint(self) -> str:
        others = [name for name in adapter_names(self._student.model) if name != self._adapter]
        return weights_fingerprint(self._student, without=others)


def check_teacher(settings: AdapterTeacherConfig, setting: Setting) -> list[Finding]:
    base = setting.config.student.model
    folder = settings.adapter
    problem = ""
    if setting.config.student.lora is None:
        problem = (
            "it shares the student's base weights, which change unless the student is trained with "
            f"[student.lora]; add that section, or use type = 'local' with model = {base!r}."
        )
    elif folder != "none" and not is_adapter(folder):
        problem = (
            f"{folder!r} is not the folder of an adapter; give one with adapter_config.json, as "
            "PEFT writes it."
        )
    if problem:
        return [Finding("error", "adapter", problem)]
    if folder == "none":
        return [Finding("ok", "adapter", f"none: the base model {base} itself")]
    try:
        # Shapes are read from the files, before any weights are loaded.
        require_shareable(folder, load_model_config(base))
    except UserError as error:
        return [Finding("error", "adapter", str(error))]
    named = base_model(folder)
    finding = Finding("ok", "adapter", f"{folder} is for {base}")
    if resolvable(named) != resolvable(base):
        message = (
            f"{folder} names {named!r} as its base model, the student's is {base!r}: its shapes "
            "fit, but with other base weights it is another teacher; continue only if the two are "
            "the same model."
        )
        finding = Finding("warning", "adapter", message)
    if not has_tokenizer(folder):
        return [finding]
    return [finding, *compare_tokenizers(setting.student_tokenizer, load_tokenizer(folder))]


def make_teacher(settings: AdapterTeacherConfig, setting: Setting) -> AdapterTeacher:
    assert setting.student is not None
    return AdapterTeacher(
        setting.student,
        base=setting.config.student.model,
        folder=None if settings.adapter == "none" else settings.adapter,
        **setting.scoring(settings.tokens_per_batch),
    )
