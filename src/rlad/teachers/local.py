"""A teacher in this process: a frozen transformers model with its own dtype and device."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import Any, Literal

import torch
from torch import Tensor

from rlad.config.teacher import LocalTeacherConfig
from rlad.models.loading import LanguageModel, load_language_model
from rlad.scoring.scorer import Scorer
from rlad.seeds import stream_seed
from rlad.teachers.base import Setting, SynchronousTeacher, TeacherRequest
from rlad.teachers.fingerprint import weights_fingerprint


class LocalTeacher(SynchronousTeacher):
    """Scores the sampled tokens only, in micro-batches by token budget; never holds `[batch, token,
    vocabulary]`."""

    def __init__(
        self,
        language_model: LanguageModel,
        *,
        temperature: float,
        tokens_per_batch: int,
        identity: str | None = None,
        keep: Literal["gpu", "cpu"] = "gpu",
        before_work: Callable[[], None] = lambda: None,
    ):
        """With `keep` = "cpu" the weights are on the model's present device only while it scores,
        and else on the CPU."""
        language_model.model.requires_grad_(False)
        self.identity, self.language_model = identity or language_model.name, language_model
        self._vocabulary = language_model.vocabulary
        self._scorer = Scorer(
            language_model,
            temperature=temperature,
            tokens_per_batch=tokens_per_batch,
            before_work=before_work,
        )
        self._works_on = language_model.model.device
        self._rests_on = torch.device("cpu") if keep == "cpu" else self._works_on
        self._move(self._rests_on)

    @property
    def fingerprint(self) -> str:
        return weights_fingerprint(self.language_model)

    def logprobs(self, requests: Sequence[TeacherRequest]) -> list[Tensor]:
        with self._at_work():
            return score_known_tokens(self._scorer, self._vocabulary, requests)

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        self._move(self._works_on)
        try:
            yield
        finally:
            self._move(self._rests_on)

    def _move(self, device: torch.device) -> None:
        model: Any = self.language_model.model
        if model.device != device:
            model.to(device)


def score_known_tokens(
    scorer: Scorer, vocabulary: int, requests: Sequence[TeacherRequest]
) -> list[Tensor]:
    """Log-probs of completions whose token ids may go beyond a model's vocabulary: NaN from the
    first such id on.

    A student whose vocabulary is padded further than the teacher's can sample one.
    """
    known = [
        list(takewhile(lambda token: token < vocabulary, request.completion))
        for request in requests
    ]
    rows = [i for i, completion in enumerate(known) if completion]
    results = [torch.full((len(request.completion),), torch.nan) for request in requests]
    for i, values in zip(
        rows,
        scorer.score([requests[i].prompt for i in rows], [known[i] for i in rows]),
        strict=True,
    ):
        results[i] = torch.cat([values, results[i][len(values) :].to(values)])
    return results


def quantization_config(quantization: str) -> Any:
    """What transformers quantises the weights of a model's linear layers by as it loads them; None
    for "none".

    int8: symmetric, a scale for each output channel. int4: asymmetric, a scale and a zero point for
    each 64 inputs (tinygemm). transformers leaves the output layer as it is, so log-probs are
    computed from it in tiles as of every other model.
    """
    if quantization == "none":
        return None
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    if quantization == "int8":
        return TorchAoConfig(Int8WeightOnlyConfig())
    return TorchAoConfig(
        Int4WeightOnlyConfig(group_size=64, int4_packing_format="tile_packed_to_4d")
    )  # type: ignore[arg-type]


def load_teacher_model(settings: LocalTeacherConfig, setting: Setting) -> LanguageModel:
    """The weights, on the student's device unless another is named."""
    assert setting.student is not None
    return load_language_model(
        settings.model,
        dtype=settings.dtype,
        device=str(setting.student.model.device) if settings.device == "auto" else settings.device,
        random_weights_seed=stream_seed(setting.config.seed, "random teacher", 0)
        if settings.random_weights
        else None,
        quantization=quantization_config(settings.quantization),
    )


def make_teacher(settings: LocalTeacherConfig, setting: Setting) -> LocalTeacher:
    return LocalTeacher(
        load_teacher_model(settings, setting),
        temperature=setting.temperature,
        tokens_per_batch=settings.tokens_per_batch,
        identity=identity_of(settings, setting.config.seed),
        keep=settings.keep,
        before_work=setting.before_work,
    )


def identity_of(settings: LocalTeacherConfig, seed: int) -> str:
    """The model's name, and all that makes other numbers of it than its float32 weights give."""
    differs = [
        *([settings.dtype] if settings.dtype != "float32" else []),
        *([settings.quantization] if settings.quantization != "none" else []),
        *([f"random weights of seed {seed}"] if settings.random_weights else []),
    ]
    return f"{settings.model} ({', '.join(differs)})" if differs else settings.model
