"""Completions from the student.

Randomness is explicit: row `i` of a call uses the uniform numbers `uniforms[i]`, one per token, through the inverse
distribution function. So the tokens do not depend on the batch a row is in, on dropped neighbours, or on which of the two
decoders below runs; and a run resumes exactly by giving the same seed.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from rlad.rollouts import Completion

# Rows are compacted once this share of the batch has finished: copying the cache costs about one decoding step.
_COMPACT_SHARE = 0.2


def pick_tokens(logits: Tensor, uniforms: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """One token per row, and its log-prob, by inverting the distribution function of softmax(logits / temperature).

    `logits` [batch, vocabulary], `uniforms` [batch] in [0, 1). Returns token ids [batch] and float32 log-probs [batch].
    `temperature` 0 takes the most likely token and reports its log-prob at temperature 1.
    """
    logprobs = torch.log_softmax(logits.float() / (temperature or 1.0), dim=-1)
    if temperature == 0:
        tokens = logprobs.argmax(dim=-1)
    else:
        cumulative = logprobs.exp().cumsum(dim=-1)
        # right=True: the first token whose cumulative probability exceeds the target, so never one of probability 0.
        target = uniforms[:, None] * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, target, right=True).squeeze(1).clamp(max=logits.shape[1] - 1)
    return tokens, logprobs.gather(1, tokens[:, None]).squeeze(1)


def sample(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    group_size: int,
    max_completion_tokens: int,
    temperature: float,
    eos_token_ids: Sequence[int],
    pad_token_id: int,
    seed: int,
    max_batch_rows: int = 256,
    before_token: Callable[[], None] = lambda: None,
) -> list[list[Completion]]:
    """`group_size` completions of each prompt (token ids), in the order of the prompts.

    A completion ends with the first of `eos_token_ids` (kept as its last token) or at `max_completion_tokens`. At most
    `max_batch_rows` rows are decoded at once. `before_token` is called before every decoding step and may raise.
    Log-probs are those of the sampled tokens after division by the temperature, float32.
    """
    generator = torch.Generator().manual_seed(seed)
    uniforms = torch.rand(len(prompts) * group_size, max_completion_tokens, generator=generator).to(model.device)
    decode = _decode if _cache_rows_can_be_dropped(model) else _generate
    rows: list[Completion] = []
    prompts_per_batch = max(1, max_batch_rows // group_size)
    with torch.inference_mode():
        for start in range(0, len(prompts), prompts_per_batch):
            batch = prompts[start : start + prompts_per_batch]
            first = start * group_size
            tokens, logprobs = decode(
                model,
                *_left_padded(batch, pad_token_id, model.device),
                group_size,
                uniforms[first : first + len(batch) * group_size],
                temperature,
                torch.tensor(list(eos_token_ids), device=model.device),
                pad_token_id,
                before_token,
            )
            rows += _completions(tokens.tolist(), logprobs.tolist(), set(eos_token_ids))
    return [rows[i : i + group_size] for i in range(0, len(rows), group_size)]


def _cache_rows_can_be_dropped(model: PreTrainedModel) -> bool:
    """Whether the model's cache is plain keys and values; recurrent and hybrid models go through `generate`."""
    if getattr(model, "_is_stateful", False):
        return False
    return all(isinstance(layer, DynamicLayer) for layer in DynamicCache(config=model.config).layers)


def _left_padded(prompts: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    longest = max(len(p) for p in prompts)
    ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    return ids, mask


def _decode(
    model: PreTrainedModel,
    ids: Tensor,
    mask: Tensor,
    group_size: int,
    uniforms: Tensor,
    temperature: float,
    eos: Tensor,
    pad: int,
    before_token: Callable[[], None],
) -> tuple[Tensor, Tensor]:
    """Prefill each prompt once, then decode its group together; finished rows leave the batch."""
    num_rows, max_tokens = uniforms.shape
    tokens_out = torch.full((num_rows, max_tokens), -1, device=ids.device)
    logprobs_out = torch.zeros(num_rows, max_tokens, device=ids.device)
    cache = DynamicCache(config=model.config)
    before_token()
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    out = model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1)
    logits = out.logits[:, -1].repeat_interleave(group_size, dim=0)
    cache.batch_repeat_interleave(group_size)
    mask = mask.repeat_interleave(group_size, dim=0)
    rows = torch.arange(num_rows, device=ids.device)  # which output row each row of the batch belongs to
    alive = torch.ones(num_rows, dtype=torch.bool, device=ids.device)
    for step in range(max_tokens):
        tokens, logprobs = pick_tokens(logits, uniforms[rows, step], temperature)
        tokens_out[rows[alive], step] = tokens[alive]
        logprobs_out[rows[alive], step] = logprobs[alive]
        alive &= ~torch.isin(tokens, eos)
        num_alive = int(alive.sum())
        if num_alive == 0 or step == max_tokens - 1:
            break
        if num_alive <= (1 - _COMPACT_SHARE) * len(rows):
            kept = alive.nonzero().squeeze(1)
            cache.batch_select_indices(kept)
            rows, tokens, mask, alive = rows[kept], tokens[kept], mask[kept], alive[kept]
        before_token()
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        positions = mask.sum(dim=1, keepdim=True) - 1
        # A finished row that has not been dropped yet decodes on unseen; its tokens are not stored.
        out = model(input_ids=tokens[:, None], attention_mask=mask, position_ids=positions, past_key_values=cache)
        logits = out.logits[:, -1]
    return tokens_out, logprobs_out


class _PickTokens(LogitsProcessor):
    """Makes `generate` take exactly the token of `pick_tokens`, whatever its own choice would be."""

    def __init__(self, uniforms: Tensor, temperature: float, before_token: Callable[[], None]):
        self.uniforms, self.temperature, self.before_token = uniforms, temperature, before_token
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.before_token()
        tokens, logprobs = pick_tokens(scores, self.uniforms[:, len(self.logprobs)], self.temperature)
        self.logprobs.append(logprobs)
        return torch.full_like(scores, float("-inf")).scatter_(1, tokens[:, None], 0.0)


def _generate(
    model: PreTrainedModel,
    ids: Tensor,
    mask: Tensor,
    group_size: int,
    uniforms: Tensor,
    temperature: float,
    eos: Tensor,
    pad: int,
    before_token: Callable[[], None],
) -> tuple[Tensor, Tensor]:
    """The same through transformers' `generate`, for models whose cache is not plain keys and values."""
    processor = _PickTokens(uniforms, temperature, before_token)
    settings = GenerationConfig(
        max_new_tokens=uniforms.shape[1], do_sample=False, eos_token_id=eos.tolist(), pad_token_id=pad
    )
    repeated = {
        "input_ids": ids.repeat_interleave(group_size, 0),
        "attention_mask": mask.repeat_interleave(group_size, 0),
    }
    out = model.generate(**repeated, generation_config=settings, logits_processor=[processor])
    return out[:, ids.shape[1] :], torch.stack(processor.logprobs, dim=1)


def _completions(tokens: list[list[int]], logprobs: list[list[float]], eos: set[int]) -> list[Completion]:
    """Cut each row after its first end token; a row without one was truncated."""
    completions = []
    for row, values in zip(tokens, logprobs, strict=True):
        end = next((i for i, token in enumerate(row) if token in eos), None)
        length = len(row) if end is None else end + 1
        completions.append(Completion(tuple(row[:length]), tuple(values[:length]), is_truncated=end is None))
    return completions
