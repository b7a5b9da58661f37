"""A teacher in this process: a frozen transformers model with its own dtype and device."""

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import Any, Literal

import torch
from torch import Tensor

from rlad.config.task import EpisodesConfig
from rlad.config.teacher import LocalTeacherConfig
from rlad.errors import UserError
from rlad.findings import Finding
from rlad.models.adapters import require_loadable
from rlad.models.files import is_adapter, require_weights
from rlad.models.loading import LanguageModel, load_language_model, pick_device
from rlad.models.without_weights import (
    context_tokens,
    load_model_config,
    load_tokenizer,
    load_vision,
)
from rlad.scoring.distributions import TokenDistributions
from rlad.scoring.scorer import Scorer
from rlad.seeds import stream_seed
from rlad.teachers.base import Setting, SynchronousTeacher, TeacherRequest
from rlad.teachers.compatibility import compare_contexts, compare_eyes, compare_tokenizers
from rlad.teachers.fingerprint import weights_fingerprint


class ScoringTeacher(SynchronousTeacher):
    """A teacher whose model is in this process. It scores in micro-batches by token budget, and
    never holds `[batch, token, vocabulary]`."""

    def __init__(self, identity: str, scorer: Scorer):
        self.identity = identity
        self.scorer = scorer

    def logprobs(self, requests: Sequence[TeacherRequest]) -> list[Tensor]:
        # A student whose vocabulary is padded further than the teacher's can sample ids that this
        # model does not know: the first one and all tokens after it are NaN.
        vocabulary = self.scorer.language_model.vocabulary
        known = [list(takewhile(lambda t: t < vocabulary, one.completion)) for one in requests]
        rows = [i for i, completion in enumerate(known) if completion]
        scores = self.scorer.score([requests[i].prompt for i in rows], [known[i] for i in rows])
        results = [torch.full((len(request.completion),), torch.nan) for request in requests]
        for i, values in zip(rows, scores, strict=True):
            # Concatenated, not written into a buffer: scores may be float64.
            results[i] = torch.cat([values, results[i][len(values) :].to(values)])
        return results

    @property
    def gives_distributions(self) -> bool:
        return True

    def distributions(self, requests: Sequence[TeacherRequest]) -> TokenDistributions:
        return self.scorer.distributions(
            [one.prompt for one in requests], [one.completion for one in requests]
        )

    def require_comparable(self, student: Scorer) -> None:
        ours = student.head
        theirs = self.scorer.head
        device = self.works_on
        if ours is None or theirs is None:
            problem = "the logits of one of them are not a linear function of its hidden states"
        elif ours.linear.out_features != theirs.linear.out_features:
            problem = (
                f"the student has {ours.linear.out_features} token probabilities and the teacher "
                f"{theirs.linear.out_features}"
            )
        elif device != student.model.device:
            problem = f"the student is on {student.model.device} and the teacher {device}"
        else:
            return
        raise UserError(
            f"whole distributions of student and teacher cannot be compared, because {problem}; "
            "use another teacher, or objective=opd, which compares only the sampled tokens."
        )

    @property
    def works_on(self) -> torch.device:
        """The device on which it computes."""
        return self.scorer.model.device


class LocalTeacher(ScoringTeacher):
    """A frozen model of its own."""

    def __init__(
        self,
        language_model: LanguageModel,
        *,
        identity: str | None = None,
        keep: Literal["gpu", "cpu"] = "gpu",
        **scoring: Any,
    ):
        """Take a model. With `keep` = "cpu" its weights are on its present device only while it
        scores. `scoring` has the arguments of a `Scorer` besides the model."""
        language_model.model.requires_grad_(False)
        self.language_model = language_model
        super().__init__(identity or language_model.name, Scorer(language_model, **scoring))
        # A teacher kept on the CPU leaves the device's memory to the student's update.
        self._works_on = language_model.model.device
        self._rests_on = torch.device("cpu") if keep == "cpu" else self._works_on
        self._move(self._rests_on)

    @property
    def fingerprint(self) -> str:
        return weights_fingerprint(self.language_model)

    def logprobs(self, requests: Sequence[TeacherRequest]) -> list[Tensor]:
        with self.at_work():
            return super().logprobs(requests)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Keep the weights on the device where they compute."""
        self._move(self._works_on)
        try:
            yield
        finally:
            self._move(self._rests_on)

    @property
    def works_on(self) -> torch.device:
        return self._works_on

    def _move(self, device: torch.device) -> None:
        model: Any = self.language_model.model
        if model.device != device:
            model.to(device)


def quantization_config(quantization: str) -> Any:
    """Return the config by which transformers quantises linear layers on loading; None for "none".

    int8: symmetric, one scale per output channel. int4: asymmetric, one scale and one zero point
    per 64 inputs (tinygemm). transformers does not quantise the output layer, so log-probs are
    computed from it in tiles, as for every other model.
    """
    if quantization == "none":
        return None
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    if quantization == "int8":
        return TorchAoConfig(Int8WeightOnlyConfig())
    packing: Any = "tile_packed_to_4d"
    return TorchAoConfig(Int4WeightOnlyConfig(group_size=64, int4_packing_format=packing))


def check_teacher(settings: LocalTeacherConfig, setting: Setting) -> list[Finding]:
    config = load_model_config(settings.model)
    require_weights(settings.model)
    if is_adapter(settings.model):
        require_loadable(settings.model, config)
    student = setting.student_tokenizer
    run = setting.config
    return [
        *compare_tokenizers(student, load_tokenizer(settings.model), run.student.end_tokens),
        compare_contexts(
            run.rollout,
            setting.student_context,
            context_tokens(config),
            has_turns=isinstance(run.task, EpisodesConfig),
        ),
        *compare_eyes(setting.vision, load_vision(settings.model, load_tokenizer(settings.model))),
        *_check_quantization(settings, setting),
    ]


def _check_quantization(settings: LocalTeacherConfig, setting: Setting) -> list[Finding]:
    if settings.quantization == "none":
        return []
    is_auto = settings.device == "auto"
    device = pick_device(setting.config.student.device if is_auto else settings.device)
    problem = ""
    if any(importlib.util.find_spec(package) is None for package in ("torchao", "accelerate")):
        problem = (
            "needs torchao and accelerate; install them with: pip install 'rlad[quantization]'"
        )
    elif is_adapter(settings.model):
        problem = "is for whole models; merge the adapter into its base model first"
    elif settings.quantization == "int4" and device.type != "cuda":
        problem = (
            f"has no kernel on the device '{device}'; set it to 'int8', or teacher.device to a GPU"
        )
    if problem:
        message = f"teacher.quantization = {settings.quantization!r} {problem}."
        return [Finding("error", "quantization", message)]
    message = f"linear layers {settings.quantization}, the output layer {settings.dtype}"
    return [Finding("ok", "quantization", message)]


def make_teacher(settings: LocalTeacherConfig, setting: Setting) -> LocalTeacher:
    assert setting.student is not None
    seed = setting.config.seed
    is_auto = settings.device == "auto"
    is_random = settings.random_weights
    language_model = load_language_model(
        settings.model,
        dtype=settings.dtype,
        device=str(setting.device or setting.student.model.device) if is_auto else settings.device,
        random_weights_seed=stream_seed(seed, "random teacher", 0) if is_random else None,
        quantization=quantization_config(settings.quantization),
    )
    return LocalTeacher(
        language_model,
        identity=identity_of(settings, seed),
        keep=settings.keep,
        **setting.scoring(settings.tokens_per_batch),
    )


def identity_of(settings: LocalTeacherConfig, seed: int) -> str:
    """Return the model's name with every setting that makes its numbers differ from those of its
    float32 weights."""
    random_weights = f"random weights of seed {seed}" if settings.random_weights else "none"
    said = [settings.dtype, settings.quantization, random_weights]
    differs = [one for one in said if one not in ("float32", "none")]
    return f"{settings.model} ({', '.join(differs)})" if differs else settings.model
