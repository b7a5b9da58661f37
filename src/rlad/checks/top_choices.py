"""Do student and teacher like the same tokens? Their most likely next tokens compared, without
`[batch, token, vocabulary]`."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor

from rlad.models.loading import LanguageModel
from rlad.scoring.scorer import Scorer, TokenIds

NUM_CHOICES = 5
_CHUNK_TOKENS = 256


@dataclass(frozen=True, slots=True)
class TopChoices:
    """Over all tokens of some completions."""

    same_first: float
    """share of tokens at which both have the same most likely token"""
    shared: float
    """of the student's `NUM_CHOICES` most likely tokens, the share that is among the teacher's,
    too"""


@torch.no_grad()
def compare_top_choices(
    student: LanguageModel,
    teacher: LanguageModel,
    prompts: Sequence[TokenIds],
    completions: Sequence[TokenIds],
) -> TopChoices | None:
    """One completion at a time, its logits in chunks of tokens. None without tokens.

    A token that only one of the two knows, as their vocabularies are padded to different sizes, is
    no choice and ends a completion.
    """
    scorers = [Scorer(model, temperature=1.0, tokens_per_batch=1) for model in (student, teacher)]
    vocabulary = min(student.vocabulary, teacher.vocabulary)
    same: list[Tensor] = []
    shared: list[Tensor] = []
    for prompt, whole in zip(prompts, completions, strict=True):
        text = [*prompt, *takewhile(lambda token: token < vocabulary, whole)]
        chunks = [
            scorer.logits_in_chunks(text, start=len(prompt), chunk_tokens=_CHUNK_TOKENS)
            for scorer in scorers
        ]
        for logits in zip(*chunks, strict=True):
            ours, theirs = (_choices(part[:, :vocabulary]) for part in logits)
            same.append(ours[:, 0] == theirs[:, 0])
            shared.append((ours[:, :, None] == theirs[:, None, :]).any(dim=2).float().mean(dim=1))
    if not sum(map(len, same)):
        return None
    return TopChoices(float(torch.cat(same).float().mean()), float(torch.cat(shared).mean()))


def _choices(logits: Tensor) -> Tensor:
    """`[token, NUM_CHOICES]`, most likely first."""
    return logits.topk(min(NUM_CHOICES, logits.shape[1])).indices.cpu()
