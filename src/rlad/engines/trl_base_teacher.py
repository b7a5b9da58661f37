"""The base model of TRL's PEFT student as its teacher: one set of weights for both."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase
from trl.trainer.utils import use_adapter

from rlad.models.loading import LanguageModel
from rlad.scoring.scorer import Scorer
from rlad.teachers.base import Teacher, TeacherRequest
from rlad.teachers.local import score_known_tokens


class BaseModelTeacher(Teacher):
    """Scores with the student's adapters switched off; nothing of the student is frozen or moved by it."""

    def __init__(self, student: Any, tokenizer: PreTrainedTokenizerBase, **scoring: Any):
        """`student` is a `PeftModel`; `scoring` is what a `Scorer` takes beside the model."""
        base = student.get_base_model()
        language_model = LanguageModel(str(base.config.name_or_path), base, tokenizer, (), 0, base.dtype)
        self.identity = f"{language_model.name} without adapter"
        self._student, self._vocabulary = student, language_model.vocabulary
        self._scorer = Scorer(language_model, **scoring)

    def logprobs(self, requests: Sequence[TeacherRequest]) -> list[Tensor]:
        was_training = self._student.training
        self._student.eval()
        try:
            with use_adapter(self._student, None):
                return score_known_tokens(self._scorer, self._vocabulary, requests)
        finally:
            self._student.train(was_training)
