"""A teacher in this process: a frozen transformers model with its own dtype and device."""

from collections.abc import Sequence
from itertools import takewhile

import torch
from torch import Tensor

from rlad.language_model import (
    LanguageModel,
    context_tokens,
    load_language_model,
    load_model_config,
    load_tokenizer,
    require_weights,
)
from rlad.scoring import Scorer
from rlad.seeds import stream_seed
from rlad.teacher_config import LocalTeacherConfig
from rlad.teachers import Setting, Teacher, TeacherRequest
from rlad.teachers.compatibility import Finding, compare_contexts, compare_tokenizers


class LocalTeacher(Teacher):
    """Scores the sampled tokens only, in micro-batches by token budget; never holds `[batch, token, vocabulary]`."""

    def __init__(self, language_model: LanguageModel, *, temperature: float, tokens_per_batch: int):
        language_model.model.requires_grad_(False)
        self.identity = language_model.name
        self._vocabulary = language_model.vocabulary
        self._scorer = Scorer(language_model, temperature=temperature, tokens_per_batch=tokens_per_batch)

    def logprobs(self, requests: Sequence[TeacherRequest]) -> list[Tensor]:
        return score_known_tokens(self._scorer, self._vocabulary, requests)


def score_known_tokens(scorer: Scorer, vocabulary: int, requests: Sequence[TeacherRequest]) -> list[Tensor]:
    """Log-probs of completions whose token ids may go beyond a model's vocabulary: NaN from the first such id on.

    A student whose vocabulary is padded further than the teacher's can sample one.
    """
    known = [list(takewhile(lambda token: token < vocabulary, request.completion)) for request in requests]
    rows = [i for i, completion in enumerate(known) if completion]
    results = [torch.full((len(request.completion),), torch.nan) for request in requests]
    for i, values in zip(rows, scorer.score([requests[i].prompt for i in rows], [known[i] for i in rows]), strict=True):
        results[i] = torch.cat([values, results[i][len(values) :].to(values)])
    return results


def check_teacher(settings: LocalTeacherConfig, setting: Setting) -> list[Finding]:
    config = load_model_config(settings.model)
    require_weights(settings.model)
    return [
        *compare_tokenizers(setting.student_tokenizer, load_tokenizer(settings.model)),
        compare_contexts(setting.config.rollout, setting.student_context, context_tokens(config)),
    ]


def load_teacher_model(settings: LocalTeacherConfig, setting: Setting) -> LanguageModel:
    """The weights, on the student's device unless another is named."""
    assert setting.student is not None
    return load_language_model(
        settings.model,
        dtype=settings.dtype,
        device=str(setting.student.model.device) if settings.device == "auto" else settings.device,
        random_weights_seed=stream_seed(setting.config.seed, "random teacher", 0) if settings.random_weights else None,
    )


def make_teacher(settings: LocalTeacherConfig, setting: Setting) -> LocalTeacher:
    model = load_teacher_model(settings, setting)
    return LocalTeacher(model, temperature=setting.temperature, tokens_per_batch=settings.tokens_per_batch)
