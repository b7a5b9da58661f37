"""A teacher in this process: a frozen transformers model with its own dtype and device."""

from collections.abc import Sequence

from torch import Tensor

from rlad.language_model import LanguageModel
from rlad.scoring import Scorer


class LocalTeacher:
    """Scores the sampled tokens only, in micro-batches by token budget; never holds `[batch, token, vocabulary]`."""

    def __init__(self, language_model: LanguageModel, *, temperature: float, tokens_per_batch: int):
        language_model.model.requires_grad_(False)
        self.identity = language_model.name
        self._scorer = Scorer(language_model, temperature=temperature, tokens_per_batch=tokens_per_batch)

    def logprobs(self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> list[Tensor]:
        return self._scorer.score(prompts, completions)
