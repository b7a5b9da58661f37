"""Completions from the student.

Randomness is explicit: row `i` of a call uses the uniform numbers `uniforms[i]`, one per token,
through the inverse distribution function. So the tokens do not depend (but for rounding) on the
batch a row is in, on dropped neighbours, or on which of the two decoders below runs; and a run
resumes exactly by giving the same seed.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
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

from rlad.config.run import RolloutConfig
from rlad.errors import UserError
from rlad.models.loading import LanguageModel
from rlad.models.vision import seen
from rlad.rollouts.decoding_steps import GraphSteps, PlainSteps, obstacle_to_graphs
from rlad.rollouts.kept_cache import ContinuedSteps, Held, KeptCache
from rlad.rollouts.types import Completion, Rows, Sampler
from rlad.scoring.tiles import tokens_per_chunk

# Rows are compacted once this share of the batch has finished: copying the cache costs about one
# decoding step.
_COMPACT_SHARE = 0.2


def pick_tokens(
    logits: Tensor, uniforms: Tensor, temperature: float, forbidden: Sequence[int] = ()
) -> tuple[Tensor, Tensor]:
    """One token per row, and its log-prob, by inverting the distribution function of softmax(logits
    / temperature).

    `logits` [batch, vocabulary], `uniforms` [batch] in [0, 1). Returns token ids [batch] and
    float32 log-probs [batch]. `temperature` 0 takes the most likely token and reports its log-prob
    at temperature 1. `forbidden` tokens are never picked; log-probs are those of the whole
    vocabulary all the same, as a scorer computes them. What is made of the logits on the way exists
    for a chunk of rows at a time.
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
    # The token whose slice of the cumulative distribution holds the uniform number.
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
    # Never -inf: rounding of the cumulative sum may pick a token whose probability underflows.
    return tokens, probs.gather(1, tokens[:, None]).squeeze(1).clamp(
        min=torch.finfo(torch.float32).tiny
    ).log()


class OwnSampler(Sampler):
    """Samples from a model itself."""

    name = "native"
    is_trainers_own = True

    def __init__(
        self, language_model: LanguageModel, rollout: RolloutConfig, *, because: str | None = None
    ):
        """Raises `UserError` where CUDA graphs are asked for and not possible."""
        self._model = language_model
        self._max_batch_rows = rollout.max_batch_rows
        self.description = "our own decoder" + (f": {because}" if because else "")
        self._make_steps = PlainSteps
        if rollout.cuda_graphs:
            if obstacle := obstacle_to_graphs(language_model.model):
                raise UserError(
                    f"rollout.cuda_graphs = true, but {obstacle}; set it to false, which decodes "
                    "without."
                )
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
    """`group_size` completions of each prompt (token ids), in the order of the prompts.

    A completion ends with the model's first end token (kept as its last token) or at
    `max_completion_tokens`. At most `max_batch_rows` rows are decoded at once. `before_token` is
    called before every decoding step and may raise. `after_group` is given a prompt's number and
    its completions when the last of them has ended, while others are still decoded. `rows` says of
    prompts that continue episodes, each a group of one, whose random numbers they use; `kept` holds
    what the turns before have computed of them, and is given what this one computes. Log-probs
    are those of the sampled tokens after division by the temperature, float32. Raises `UserError`
    for a prompt without tokens and for a model whose logits are not finite.
    """
    if not all(prompts):
        raise UserError(
            "a prompt has no tokens, so there is nothing to predict the first token from; give "
            "every prompt some text."
        )
    limits = rows.max_tokens if rows else [max_completion_tokens] * len(prompts)
    lengths = [len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True)]
    language_model.require_one_rope(max(lengths, default=0))
    # All uniform numbers are drawn before anything is decoded, so a row's do not depend on the
    # batch that it is decoded in.
    device = language_model.model.device
    prompt_of_row = [p for p in range(len(prompts)) for _ in range(group_size)]
    num_rows = rows.num_all if rows else len(prompt_of_row)
    uniforms = _uniforms(num_rows, max_completion_tokens, seed, rows).to(device)
    most = torch.tensor([limit for limit in limits for _ in range(group_size)], device=device)
    decode = _decode if _cache_rows_can_be_dropped(language_model.model) else _generate
    # What is kept of all rows may be as large as the cache of one batch, and no larger.
    fits = num_rows <= max_batch_rows
    if not fits or make_steps is not PlainSteps or not _cache_can_be_kept(language_model):
        kept = None
    numbers = range(num_rows) if rows is None else rows.numbers
    groups = _Groups(language_model, most.tolist(), group_size, after_group)
    vision = language_model.vision
    with torch.inference_mode(), language_model.autocast():
        for start in range(0, len(prompt_of_row), max_batch_rows):
            owners = prompt_of_row[start : start + max_batch_rows]
            asked = prompts[owners[0] : owners[-1] + 1]
            part = numbers[start : start + max_batch_rows]
            steps = make_steps
            if kept is not None and rows is not None and (held := kept.take(part)) is not None:
                steps = partial(_continued, held, asked)
            ids, mask = _left_padded(asked, language_model.pad_token_id, device)
            decode(
                language_model,
                _Batch(
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
                    vision.placeholder_ids if vision else (),
                    None if kept is None else partial(_keep, kept, part),
                ),
            )
    return groups.completions


def _uniforms(num_rows: int, max_tokens: int, seed: int, rows: Rows | None) -> Tensor:
    """Draw the uniform numbers [row, token] of all rows, and return those of this call's."""
    drawn = torch.rand(num_rows, max_tokens, generator=torch.Generator().manual_seed(seed))
    return drawn if rows is None else drawn[list(rows.numbers)]


class _Groups:
    """Collects the completions that have ended, and gives a group away with the last of them."""

    def __init__(
        self,
        language_model: LanguageModel,
        max_tokens: list[int],
        group_size: int,
        after_group: Callable[[int, list[Completion]], None],
    ):
        """`max_tokens` are those of each row."""
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
        """`tokens`, `logprobs` [row, token] of rows that are numbered from `start` on."""
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
                # What others do with a group is no part of decoding: tensors that they make may be
                # trained on.
                with (
                    torch.inference_mode(False),
                    torch.autocast(self._model.model.device.type, enabled=False),
                ):
                    self._after_group(number, [group[i] for i in range(self._size)])


def _cache_rows_can_be_dropped(model: PreTrainedModel) -> bool:
    """Whether the cache is plain keys and values and positions can be given; other models go
    through `generate`.

    The types are compared exactly: the layers of hybrid models derive from the plain ones but hold
    a recurrent state too.
    """
    taken = inspect.signature(model.forward).parameters.keys()
    if model._is_stateful or not {"position_ids", "past_key_values"} <= taken:
        return False
    return all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)
        for layer in DynamicCache(config=model.config).layers
    )


def _cache_can_be_kept(language_model: LanguageModel) -> bool:
    """Whether all layers hold plain keys and values, of all tokens, and none is of a picture."""
    model = language_model.model
    if language_model.vision is not None or not _cache_rows_can_be_dropped(model):
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


@dataclass(frozen=True, slots=True)
class _Batch:
    """Rows that are decoded together. Row `i` continues prompt `owners[i]` with the random numbers
    `uniforms[i]`."""

    prompts: Sequence[Sequence[int]]
    ids: Tensor
    """of the prompts, padded on the left, `[prompt, token]`"""
    mask: Tensor
    owners: Tensor
    uniforms: Tensor
    max_tokens: Tensor
    """of each row"""
    temperature: float
    before_token: Callable[[], None]
    after_rows: Callable[[list[int], Tensor, Tensor], None]
    """gets rows that have ended, and their tokens and log-probs `[row, token]`"""
    make_steps: Callable[..., PlainSteps]
    forbidden: Sequence[int] = ()
    """tokens that no completion may hold"""
    keep: Callable[[PlainSteps, list[int], list[int]], None] | None = None
    """gets rows that have ended, and their places among those that are decoded"""

    def pick(self, rows: Tensor, step: int, logits: Tensor) -> tuple[Tensor, Tensor]:
        return pick_tokens(logits, self.uniforms[rows, step], self.temperature, self.forbidden)


def _left_padded(
    prompts: Sequence[Sequence[int]], pad: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    longest = max(len(p) for p in prompts)
    ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    return ids, mask


def _decode(language_model: LanguageModel, batch: _Batch) -> None:
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
    # Which output row each row of the batch belongs to, and whether it is still to be continued.
    rows = torch.arange(num_rows, device=device)
    alive = torch.ones(num_rows, dtype=torch.bool, device=device)
    num_alive = num_rows
    least = int(batch.max_tokens.min())
    for step in range(max_tokens):
        tokens, logprobs = batch.pick(rows, step, steps.logits)
        # A row that has ended is decoded until it is dropped; what it writes then is not read.
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
        # Once many rows have finished, drop them from the batch, and at once where one has used up
        # its own limit: it may be at the end of the context, and no position comes after that. A
        # row keeps its uniform numbers, so the others' tokens do not change.
        if num_alive <= (1 - _COMPACT_SHARE) * len(rows) or step + 1 >= least:
            kept = alive.nonzero().squeeze(1)
            steps.keep(kept)
            rows = rows[kept]
            tokens = tokens[kept]
            alive = alive[kept]
            least = int(batch.max_tokens[rows].min())
        batch.before_token()
        steps.advance(tokens)


def _starts(batch: _Batch) -> list[int]:
    """The column in which each prompt begins, after its padding."""
    return [batch.ids.shape[1] - len(prompt) for prompt in batch.prompts]


class _PickTokens(LogitsProcessor):
    """Makes `generate` take exactly the token of `pick_tokens`, whatever its own choice would
    be."""

    def __init__(self, batch: _Batch, rows: Tensor):
        self.batch = batch
        self.rows = rows
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.batch.before_token()
        tokens, logprobs = self.batch.pick(self.rows, len(self.logprobs), scores)
        self.logprobs.append(logprobs)
        return torch.full_like(scores, float("-inf")).scatter_(1, tokens[:, None], 0.0)


def _generate(language_model: LanguageModel, batch: _Batch) -> None:
    """The same through transformers' `generate`, for models whose cache is not plain keys and
    values.

    Prompts of one length go together: some recurrent models let padding into their state. Tokens
    after a row's end token mean nothing.
    """
    model: Any = language_model.model
    settings = GenerationConfig(
        do_sample=False,
        eos_token_id=list(language_model.eos_token_ids),
        pad_token_id=language_model.pad_token_id,
        use_cache=True,
    )
    # `generate` fills gaps from the model's own settings, and chat models bring a repetition
    # penalty: the log-probs would no longer be those of the model.
    own = model.generation_config
    model.generation_config = GenerationConfig()
    # One call for each length of prompt; its rows need no padding then.
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


def _completion(token_ids: list[int], logprobs: list[float], eos: set[int]) -> Completion:
    """Cut a row after its first end token; a row without one was truncated."""
    end = next((i for i, token in enumerate(token_ids) if token in eos), None)
    length = len(token_ids) if end is None else end + 1
    return Completion(tuple(token_ids[:length]), tuple(logprobs[:length]), end is None)
