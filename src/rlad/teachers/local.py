"""A teacher in this process: a frozen transformers model with its own dtype and device."""

from collections.abc import Sequence
from itertools import takewhile

import torch
from torch import Tensor

from rlad.language_model import LanguageModel
from rlad.scoring import Scorer


class LocalTeacher:
    """Scores the sampled tokens only, in micro-batches by token budget; never holds `[batch, token, vocabulary]`."""

    def __init__(self, language_model: LanguageModel, *, temperature: float, tokens_per_batch: int):
        language_model.model.requires_grad_(False)
        self.identity = language_model.name
        self._vocabulary = language_model.vocabulary
        self._scorer = Scorer(language_model, temperature=temperature, tokens_per_batch=tokens_per_batch)

    def logprobs(self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> list[Tensor]:
        # A student whose vocabulary is padded further can sample an id beyond the teacher's: NaN from there on.
        known = [list(takewhile(lambda token: token < self._vocabulary, completion)) for completion in completions]
        rows = [i for i, completion in enumerate(known) if completion]
        results = [torch.full((len(completion),), torch.nan) for completion in completions]
        for i, values in zip(rows, self._scorer.score([prompts[i] for i in rows], [known[i] for i in rows]), strict=True):
            results[i] = torch.cat([values, results[i][len(values) :].to(values)])
        return results
