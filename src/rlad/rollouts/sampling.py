"""Completions from the student.

Randomness is explicit: row `i` of a call uses the uniform numbers `uniforms[i]`, one per token, in
the inverse distribution function. So, except for rounding, the tokens do not depend on the batch
that a row is in, on dropped neighbours, or on the decoder. With the same seed a run resumes
exactly.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from rlad.config.run import RolloutConfig
from rlad.errors import UserError
from rlad.models.loading import LanguageModel
from rlad.rollouts.decoders import Batch, cache_rows_can_be_dropped, decode, generate
from rlad.rollouts.decoding_steps import GraphSteps, PlainSteps, obstacle_to_graphs
from rlad.rollouts.kept_cache import ContinuedSteps, Held, KeptCache
from rlad.rollouts.types import Completion, Rows, Sampler


class OwnSampler(Sampler):
    """The sampler that uses the trainer's model itself."""

    name = "native"
    is_trainers_own = True

    def __init__(
        self, language_model: LanguageModel, rollout: RolloutConfig, *, because: str | None = None
    ):
        """Make the sampler. Raises `UserError` if CUDA graphs are requested but not possible."""
        self._model = language_model
        self._max_batch_rows = rollout.max_batch_rows
        self.description = "our own decoder" + (f": {because}" if because else "")
        self._make_steps = PlainSteps
        if rollout.cuda_graphs:
            if obstacle := obstacle_to_graphs(language_model.model):
                raise UserError(f"rollout.cuda_graphs = true, but {obstacle}; set it to false.")
            self.description += ", CUDA graphs"
            self._make_steps = GraphSteps

    def sample(self, prompts: Sequence[Sequence[int]], **settings: Any) -> list[list[Completion]]:
        return sample(
            self._model,
            prompts,
            max_batch_rows=self._max_batch_rows,
            make_steps=self._make_steps,
            **settings,
        )


def sample(
    language_model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    group_size: int,
    max_completion_tokens: int,
    temperature: float,
    seed: int,
    max_batch_rows: int = 256,
    before_token: Callable[[], None] = lambda: None,
    after_group: Callable[[int, list[Completion]], None] = lambda number, completions: None,
    rows: Rows | None = None,
    kept: KeptCache | None = None,
    make_steps: Callable[..., PlainSteps] = PlainSteps,
) -> list[list[Completion]]:
    """Sample `group_size` completions of each prompt (token ids), in the order of the prompts.

    A completion ends with the model's first end token (kept as its last token) or at
    `max_completion_tokens`. At most `max_batch_rows` rows are decoded at once. `before_token` is
    called before every decoding step and may raise. `after_group` is called with a prompt's index
    and its completions once all of them have ended, while others are still decoded. For prompts
    that continue episodes, each a group of one, `rows` selects their random numbers, and `kept`
    has the keys and values of earlier turns, to which those of this turn are added. Log-probs are
    those of the sampled tokens at the temperature, float32. Raises `UserError` for a prompt without
    tokens and for a model whose logits are not finite.
    """
    if not all(prompts):
        raise UserError(
            "a prompt has no tokens, so there is nothing to predict the first token from; give "
            "every prompt some text."
        )
    limits = rows.max_tokens if rows else [max_completion_tokens] * len(prompts)
    lengths = [len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True)]
    language_model.require_one_rope(max(lengths, default=0))
    # All uniform numbers are drawn before decoding, so a row's numbers do not depend on its batch.
    device = language_model.model.device
    prompt_of_row = [p for p in range(len(prompts)) for _ in range(group_size)]
    num_rows = rows.num_all if rows else len(prompt_of_row)
    uniforms = _uniforms(num_rows, max_completion_tokens, seed, rows).to(device)
    most = torch.tensor([limit for limit in limits for _ in range(group_size)], device=device)
    write = decode if cache_rows_can_be_dropped(language_model.model) else generate
    # What is kept of all rows may be at most as large as the cache of one batch.
    fits = num_rows <= max_batch_rows
    if not fits or make_steps is not PlainSteps or not _cache_can_be_kept(language_model):
        kept = None
    numbers = range(num_rows) if rows is None else rows.numbers
    groups = _Groups(language_model, most.tolist(), group_size, after_group)
    with torch.inference_mode(), language_model.autocast():
        for start in range(0, len(prompt_of_row), max_batch_rows):
            owners = prompt_of_row[start : start + max_batch_rows]
            asked = prompts[owners[0] : owners[-1] + 1]
            part = numbers[start : start + max_batch_rows]
            steps = make_steps
            if kept is not None and rows is not None and (held := kept.take(part)) is not None:
                steps = partial(_continued, held, asked)
            ids, mask = _left_padded(asked, language_model.pad_token_id, device)
            write(
                language_model,
                Batch(
                    asked,
                    ids,
                    mask,
                    torch.tensor(owners, device=device) - owners[0],
                    uniforms[start : start + max_batch_rows],
                    most[start : start + max_batch_rows],
                    temperature,
                    before_token,
                    partial(groups.add, start),
                    steps,
                    language_model.never_written,
                    None if kept is None else partial(_keep, kept, part),
                ),
            )
    return groups.completions


def _uniforms(num_rows: int, max_tokens: int, seed: int, rows: Rows | None) -> Tensor:
    """Draw the uniform numbers [row, token] of all rows, and return those of this call's rows."""
    drawn = torch.rand(num_rows, max_tokens, generator=torch.Generator().manual_seed(seed))
    return drawn if rows is None else drawn[list(rows.numbers)]


class _Groups:
    """The completions that have ended. A group is passed on once its last completion has ended."""

    def __init__(
        self,
        language_model: LanguageModel,
        max_tokens: list[int],
        group_size: int,
        after_group: Callable[[int, list[Completion]], None],
    ):
        """Start without completions; `max_tokens` is the limit of each row."""
        self._model = language_model
        self._size = group_size
        self._after_group = after_group
        self._max_tokens = max_tokens
        num_groups = len(max_tokens) // group_size
        self._ended: list[dict[int, Completion]] = [{} for _ in range(num_groups)]

    @property
    def completions(self) -> list[list[Completion]]:
        return [[group[i] for i in range(self._size)] for group in self._ended]

    def add(self, start: int, rows: Sequence[int], tokens: Tensor, logprobs: Tensor) -> None:
        """Add `tokens` and `logprobs` [row, token] of ended rows, whose indices count from
        `start`."""
        if not torch.isfinite(logprobs).all():
            raise UserError(
                f"the logits of {self._model.name!r} are not finite: its weights are broken or its "
                "dtype is too narrow; use float32 or bfloat16, or an earlier checkpoint."
            )
        eos = set(self._model.eos_token_ids)
        for row, ids, values in zip(rows, tokens.tolist(), logprobs.tolist(), strict=True):
            number, place = divmod(start + row, self._size)
            group = self._ended[number]
            most = self._max_tokens[start + row]
            group[place] = _completion(ids[:most], values[:most], eos)
            if len(group) == self._size:
                # The callback is not part of decoding: tensors that it makes may be trained on.
                with (
                    torch.inference_mode(False),
                    torch.autocast(self._model.model.device.type, enabled=False),
                ):
                    self._after_group(number, [group[i] for i in range(self._size)])


def _cache_can_be_kept(language_model: LanguageModel) -> bool:
    """Return whether all layers have plain keys and values of all tokens, and the model reads only
    text."""
    model = language_model.model
    if language_model.vision is not None or not cache_rows_can_be_dropped(model):
        return False
    return all(type(one) is DynamicLayer for one in DynamicCache(config=model.config).layers)


def _keep(
    kept: KeptCache,
    numbers: Sequence[int],
    steps: PlainSteps,
    rows: list[int],
    places: list[int],
) -> None:
    for row, place in zip(rows, places, strict=True):
        kept.put(numbers[row], steps.cache, place, steps.mask[place])


def _continued(
    held: Sequence[Held], sequences: Sequence[Sequence[int]], model: PreTrainedModel, *_: Tensor
) -> ContinuedSteps:
    return ContinuedSteps(model, held, sequences)


def _left_padded(
    prompts: Sequence[Sequence[int]], pad: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    longest = max(len(p) for p in prompts)
    ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    return ids, mask


def _completion(token_ids: list[int], logprobs: list[float], eos: set[int]) -> Completion:
    """Cut a row after its first end token; a row without one was truncated."""
    end = next((i for i, token in enumerate(token_ids) if token in eos), None)
    length = len(token_ids) if end is None else end + 1
    return Completion(tuple(token_ids[:length]), tuple(logprobs[:length]), end is None)
