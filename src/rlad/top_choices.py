"""Do student and teacher like the same tokens? Their most likely next tokens compared, without `[batch, token, vocabulary]`."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor

from rlad.language_model import LanguageModel
from rlad.scoring import TokenIds, linear_head

NUM_CHOICES = 5
_CHUNK_TOKENS = 256


@dataclass(frozen=True, slots=True)
class TopChoices:
    """Over all tokens of some completions."""

    same_first: float
    """share of tokens at which both have the same most likely token"""
    shared: float
    """of the student's `NUM_CHOICES` most likely tokens, the share that is among the teacher's, too"""


@torch.no_grad()
def compare_top_choices(
    student: LanguageModel, teacher: LanguageModel, prompts: Sequence[TokenIds], completions: Sequence[TokenIds]
) -> TopChoices | None:
    """One completion at a time, its logits in chunks of tokens. None where a model's logits are more than an output layer's.

    A token that only one of the two knows, as their vocabularies are padded to different sizes, is no choice and ends a
    completion.
    """
    models, heads = (student, teacher), [linear_head(one.model) for one in (student, teacher)]
    if any(head is None for head in heads):
        return None
    vocabulary = min(student.vocabulary, teacher.vocabulary)
    same: list[Tensor] = []
    shared: list[Tensor] = []
    for prompt, whole in zip(prompts, completions, strict=True):
        completion = list(takewhile(lambda token: token < vocabulary, whole))
        hidden = [_hidden_states(model, prompt, completion) for model in models]
        for parts in zip(*(states.split(_CHUNK_TOKENS) for states in hidden), strict=True):
            ours, theirs = (
                _choices(model, head, part, vocabulary) for model, head, part in zip(models, heads, parts, strict=True)
            )
            same.append(ours[:, 0] == theirs[:, 0])
            shared.append((ours[:, :, None] == theirs[:, None, :]).any(dim=2).float().mean(dim=1))
    if not sum(map(len, same)):
        return None
    return TopChoices(float(torch.cat(same).float().mean()), float(torch.cat(shared).mean()))


def _hidden_states(model: LanguageModel, prompt: TokenIds, completion: TokenIds) -> Tensor:
    """`[token, hidden]`: those that predict the completion's tokens."""
    ids = torch.tensor([[*prompt, *completion]], device=model.model.device)
    with model.autocast():
        return model.model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, len(prompt) - 1 : -1]


def _choices(model: LanguageModel, head: torch.nn.Linear | None, hidden: Tensor, vocabulary: int) -> Tensor:
    """`[token, NUM_CHOICES]`, most likely first."""
    assert head is not None
    with model.autocast():
        logits = head(hidden)[:, :vocabulary]
    return logits.float().topk(min(NUM_CHOICES, vocabulary)).indices.cpu()
