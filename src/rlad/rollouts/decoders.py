"""The two ways to decode a batch of rows: our own loop, and transformers' `generate` for models
whose cache is not plain keys and values. Both draw each token with `pick_tokens`."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from rlad.models.loading import LanguageModel
from rlad.models.vision import seen
from rlad.rollouts.decoding_steps import PlainSteps
from rlad.scoring.tiles import tokens_per_chunk

# Finished rows are dropped once they are this share of the batch: copying the cache costs about one
# decoding step.
_COMPACT_SHARE = 0.2


def pick_tokens(
    logits: Tensor, uniforms: Tensor, temperature: float, forbidden: Sequence[int] = ()
) -> tuple[Tensor, Tensor]:
    """Draw one token per row, with its log-prob, by inverting the distribution function of
    softmax(logits / temperature).

    `logits` [batch, vocabulary], `uniforms` [batch] in [0, 1). Returns token ids [batch] and
    float32 log-probs [batch]. `temperature` 0 takes the most likely token and reports its log-prob
    at temperature 1. `forbidden` tokens are never picked; log-probs are still those of the whole
    vocabulary, as a scorer computes them. Intermediate tensors exist for a chunk of rows at a time.
    """
    size = tokens_per_chunk(logits.device.type, logits.shape[1])
    picked = [
        _pick(*rows, temperature, list(forbidden))
        for rows in zip(logits.split(size), uniforms.split(size), strict=True)
    ]
    tokens, logprobs = (torch.cat(parts) for parts in zip(*picked, strict=True))
    return tokens, logprobs


def _pick(
    logits: Tensor, uniforms: Tensor, temperature: float, forbidden: list[int]
) -> tuple[Tensor, Tensor]:
    # Find the token whose interval of the cumulative distribution contains the uniform number.
    probs = torch.softmax(logits.float() / (temperature or 1.0), dim=-1)
    allowed = probs
    if forbidden:
        allowed = probs.index_fill(1, torch.tensor(forbidden, device=probs.device), 0.0)
    if temperature == 0:
        tokens = (allowed if forbidden else logits).argmax(dim=-1)
    else:
        cumulative = allowed.cumsum(dim=-1)
        # right=True: the first token whose cumulative probability exceeds the target, so never one
        # of probability 0.
        target = uniforms[:, None] * cumulative[:, -1:]
        tokens = (
            torch.searchsorted(cumulative, target, right=True)
            .squeeze(1)
            .clamp(max=logits.shape[1] - 1)
        )
    # Never -inf: rounding of the cumulative sum may pick a token whose probability underflows to 0.
    return tokens, probs.gather(1, tokens[:, None]).squeeze(1).clamp(
        min=torch.finfo(torch.float32).tiny
    ).log()


def cache_rows_can_be_dropped(model: PreTrainedModel) -> bool:
    """Return whether the cache is plain keys and values and positions can be given. Other models
    use `generate`.

    The types are compared exactly: the layers of hybrid models are subclasses of the plain ones but
    also have a recurrent state.
    """
    taken = inspect.signature(model.forward).parameters.keys()
    if model._is_stateful or not {"position_ids", "past_key_values"} <= taken:
        return False
    return all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)
        for layer in DynamicCache(config=model.config).layers
    )


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch of rows that are decoded together. Row `i` continues prompt `owners[i]` with the
    random numbers `uniforms[i]`."""

    prompts: Sequence[Sequence[int]]
    ids: Tensor
    """token ids of the prompts, padded on the left, `[prompt, token]`"""
    mask: Tensor
    owners: Tensor
    uniforms: Tensor
    max_tokens: Tensor
    """most tokens of each row"""
    temperature: float
    before_token: Callable[[], None]
    after_rows: Callable[[list[int], Tensor, Tensor], None]
    """called with rows that have ended, and their tokens and log-probs `[row, token]`"""
    make_steps: Callable[..., PlainSteps]
    forbidden: Sequence[int] = ()
    """tokens that no completion may contain"""
    keep: Callable[[PlainSteps, list[int], list[int]], None] | None = None
    """called with rows that have ended, and their indices among the rows being decoded"""

    def pick(self, rows: Tensor, step: int, logits: Tensor) -> tuple[Tensor, Tensor]:
        return pick_tokens(logits, self.uniforms[rows, step], self.temperature, self.forbidden)


def decode(language_model: LanguageModel, batch: Batch) -> None:
    """Prefill each prompt once, then decode all rows together. Finished rows leave the batch."""
    model = language_model.model
    device = batch.ids.device
    eos = torch.tensor(language_model.eos_token_ids, device=device)
    num_rows, max_tokens = batch.uniforms.shape
    tokens_out = torch.full((num_rows, max_tokens), language_model.pad_token_id, device=device)
    logprobs_out = torch.zeros(num_rows, max_tokens, device=device)
    batch.before_token()
    pictures = seen(language_model, batch.ids, batch.prompts, _starts(batch))
    steps = batch.make_steps(model, batch.ids, batch.mask, batch.owners, pictures)
    # The output row of each row in the batch, and whether it continues.
    rows = torch.arange(num_rows, device=device)
    alive = torch.ones(num_rows, dtype=torch.bool, device=device)
    num_alive = num_rows
    least = int(batch.max_tokens.min())
    for step in range(max_tokens):
        tokens, logprobs = batch.pick(rows, step, steps.logits)
        # A row that has ended is decoded until it is dropped; its further tokens are not read.
        tokens_out[rows, step] = tokens
        logprobs_out[rows, step] = logprobs
        ends = alive & (torch.isin(tokens, eos) | (step + 1 >= batch.max_tokens[rows]))
        alive = alive & ~ends
        num_before = num_alive
        num_alive = int(alive.sum())
        if num_alive < num_before:
            ended = rows[ends]
            if batch.keep is not None:
                batch.keep(steps, ended.tolist(), ends.nonzero().squeeze(1).tolist())
            batch.after_rows(
                ended.tolist(), tokens_out[ended, : step + 1], logprobs_out[ended, : step + 1]
            )
        if num_alive == 0:
            break
        # Once many rows have finished, drop them from the batch. Drop a row at once if it has
        # reached its own limit: it may be at the end of the context, without a further position.
        # Rows keep their uniform numbers, so dropping one does not change the others' tokens.
        if num_alive <= (1 - _COMPACT_SHARE) * len(rows) or step + 1 >= least:
            kept = alive.nonzero().squeeze(1)
            steps.keep(kept)
            rows = rows[kept]
            tokens = tokens[kept]
            alive = alive[kept]
            least = int(batch.max_tokens[rows].min())
        batch.before_token()
        steps.advance(tokens)


def _starts(batch: Batch) -> list[int]:
    """Return the column in which each prompt begins, after its padding."""
    return [batch.ids.shape[1] - len(prompt) for prompt in batch.prompts]


class _PickTokens(LogitsProcessor):
    """A logits processor that makes `generate` take exactly the token of `pick_tokens`."""

    def __init__(self, batch: Batch, rows: Tensor):
        self.batch = batch
        self.rows = rows
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.batch.before_token()
        tokens, logprobs = self.batch.pick(self.rows, len(self.logprobs), scores)
        self.logprobs.append(logprobs)
        return torch.full_like(scores, float("-inf")).scatter_(1, tokens[:, None], 0.0)


def generate(language_model: LanguageModel, batch: Batch) -> None:
    """Decode with transformers' `generate`, for models whose cache is not plain keys and values.

    Prompts of one length are decoded together, since some recurrent models let padding into their
    state. Tokens after a row's end token have no meaning.
    """
    model: Any = language_model.model
    settings = GenerationConfig(
        do_sample=False,
        eos_token_id=list(language_model.eos_token_ids),
        pad_token_id=language_model.pad_token_id,
        use_cache=True,
    )
    # `generate` takes missing settings from the model, and chat models have a repetition penalty,
    # with which log-probs would no longer be the model's.
    own = model.generation_config
    model.generation_config = GenerationConfig()
    # One call for each prompt length, so that rows need no padding.
    lengths = batch.mask.sum(dim=1)[batch.owners]
    try:
        for length in lengths.unique().tolist():
            rows = (lengths == length).nonzero().squeeze(1)
            owners = batch.owners[rows]
            prompts = batch.ids[owners, -length:]
            picker = _PickTokens(batch, rows)
            settings.max_new_tokens = int(batch.max_tokens[rows].max())
            asked = [batch.prompts[i] for i in owners.tolist()]
            pictures = seen(language_model, prompts, asked, [0] * len(asked))
            tokens = model.generate(
                input_ids=prompts,
                attention_mask=torch.ones_like(prompts),
                generation_config=settings,
                **pictures,
                logits_processor=LogitsProcessorList([picker]),
            )
            logprobs = torch.stack(picker.logprobs, dim=1)
            batch.after_rows(rows.tolist(), tokens[:, length:], logprobs)
    finally:
        model.generation_config = own
