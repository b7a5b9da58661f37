"""Log-probs of given completions with any causal language model: student, teacher and reference.

Log-prob definition: completion token t given the prompt and the tokens before it, logits divided by
the sampling temperature, float32. Sequences are padded on the right. A causal model does not attend
to later tokens, so no attention mask is needed.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlad.errors import RunFailedError, UserError
from rlad.models.loading import LanguageModel
from rlad.models.vision import seen
from rlad.scoring.distributions import Distributions, float32_or_wider
from rlad.scoring.output_layer import output_layer
from rlad.scoring.tiles import tokens_per_chunk
from rlad.scoring.token_logprobs import token_logprobs

TokenIds = Sequence[int]
# Nats per token by which a row alone may differ from the same row in a batch, in types narrower
# than float32 and in float32.
NEIGHBOUR_LIMITS = (0.5, 1e-3)


@dataclass(frozen=True, slots=True)
class CompletionScores:
    """The scores of a batch of completions, all `[batch, token]`, 0 where masked."""

    logprobs: Tensor
    entropy: Tensor
    """in nats, without gradient; NaN if not requested"""
    mask: Tensor
    divergence: Tensor | None = None
    """divergence of the whole distributions, if requested"""


class Scorer:
    """The scorer of completions with one model at one temperature."""

    def __init__(
        self,
        language_model: LanguageModel,
        *,
        temperature: float,
        tokens_per_batch: int,
        before_work: Callable[[], None] = lambda: None,
    ):
        """Make a scorer. `before_work` is called before every micro-batch of `score`; it may raise
        to stop."""
        self.before_work = before_work
        self._adds_in_place = False
        self.language_model = language_model
        self.model = language_model.model
        self.temperature = temperature
        self.tokens_per_batch = tokens_per_batch
        self.head = output_layer(language_model.model)
        self._compares_neighbours = True

    def batches(
        self, prompts: Sequence[TokenIds], completions: Sequence[TokenIds]
    ) -> list[list[int]]:
        """Group rows into micro-batches of similar length whose padded size stays within
        `tokens_per_batch`."""
        return batches_by_length(
            [len(p) + len(c) for p, c in zip(prompts, completions, strict=True)],
            self.tokens_per_batch,
        )

    def __call__(
        self,
        prompts: Sequence[TokenIds],
        completions: Sequence[TokenIds],
        *,
        with_entropy: bool = True,
        divergence: Callable[[Distributions], Tensor] | None = None,
    ) -> CompletionScores:
        """Score one micro-batch, with gradient to the model if gradients are enabled.

        `divergence` returns a number for the distribution of each token. It needs an output layer.
        """
        inputs, predicts, mask = self._padded(prompts, completions)
        targets = inputs["input_ids"].roll(-1, dims=1)[predicts]
        scores = self._token_scores(inputs, predicts, targets, with_entropy, divergence)
        # The masks `predicts` and `mask` both list tokens row by row, so flat results keep their
        # order.
        empty = torch.zeros(mask.shape, dtype=scores[0].dtype, device=mask.device)
        logprobs, entropy, *rest = (empty.masked_scatter(mask, values) for values in scores)
        return CompletionScores(logprobs, entropy, mask, *rest)

    @torch.no_grad()
    def distributions(
        self, prompts: Sequence[TokenIds], completions: Sequence[TokenIds]
    ) -> Distributions:
        """Return the distributions of all tokens, one completion after the other, without gradient.
        No forward pass has more than `tokens_per_batch` tokens."""
        assert self.head is not None
        weight = self.head.linear.weight
        found = self.head.distributions(weight.new_empty(0, weight.shape[1]))
        states = [found.hidden] * len(prompts)
        for rows in map(sorted, self.batches(prompts, completions)):
            inputs, predicts, _ = self._padded(
                [prompts[i] for i in rows], [completions[i] for i in rows]
            )
            found = self._distributions(inputs, predicts)
            parts = found.hidden.split([len(completions[i]) for i in rows])
            for i, part in zip(rows, parts, strict=True):
                states[i] = part
        return found._replace(hidden=torch.cat([found.hidden[:0], *states]))

    def _padded(
        self, prompts: Sequence[TokenIds], completions: Sequence[TokenIds]
    ) -> tuple[dict[str, Any], Tensor, Tensor]:
        """Return the model's inputs, token ids first; the positions that predict a completion's
        tokens, `[batch, prompt + completion]`; and the mask of the completions' tokens, `[batch,
        token]`."""
        if not all(prompts):
            raise UserError(
                "a prompt has no tokens, so the first token of its completion has no log-prob; "
                "give every prompt some text."
            )
        device = self.model.device
        # Padded on the right with any token: a causal model does not attend to it, and nothing is
        # read there.
        rows = [[*p, *c] for p, c in zip(prompts, completions, strict=True)]
        width = max(map(len, rows))
        self.language_model.require_one_rope(width)
        longest = max(map(len, completions))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
        starts = torch.tensor([len(p) for p in prompts], device=device)[:, None]
        lengths = torch.tensor([len(c) for c in completions], device=device)[:, None]
        # The hidden state *before* a token predicts it: positions start - 1 ... start + length - 2.
        position = torch.arange(width, device=device)[None]
        predicts = (position >= starts - 1) & (position < starts - 1 + lengths)
        inputs = {"input_ids": ids, **self._seen(ids, prompts)}
        return inputs, predicts, torch.arange(longest, device=device)[None] < lengths

    def _seen(self, ids: Tensor, prompts: Sequence[TokenIds]) -> dict[str, Any]:
        """Return the model's inputs for the prompts' pictures, if there are any."""
        with self.language_model.autocast():
            return seen(self.language_model, ids, prompts, [0] * len(prompts))

    def _token_scores(
        self,
        inputs: dict[str, Any],
        predicts: Tensor,
        targets: Tensor,
        with_entropy: bool,
        divergence: Callable[[Distributions], Tensor] | None = None,
    ) -> tuple[Tensor, ...]:
        """Return log-probs, entropies and, if requested, divergences of the tokens `targets`."""
        if self.head is None:
            assert divergence is None
            return self._scores_of_all_logits(inputs, predicts, targets)
        distributions = self._distributions(inputs, predicts)
        scores = token_logprobs(distributions, targets, with_entropy=with_entropy)
        return scores if divergence is None else (*scores, divergence(distributions))

    def _distributions(self, inputs: dict[str, Any], predicts: Tensor) -> Distributions:
        assert self.head is not None
        with self.language_model.autocast():
            states = self.model.base_model(**inputs, use_cache=False).last_hidden_state
        return self.head.distributions(
            states[predicts].to(self.language_model.compute_dtype),
            temperature=self.temperature,
            weight_grad=self.head.linear.weight.grad if self._adds_in_place else None,
        )

    def _scores_of_all_logits(
        self, inputs: dict[str, Any], predicts: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        with self.language_model.autocast():
            logits = self.model(**inputs, use_cache=False).logits[predicts]
        logprobs = (logits.to(float32_or_wider(logits.dtype)) / self.temperature).log_softmax(
            dim=-1
        )
        with torch.no_grad():
            # A token of probability 0 has the log-prob -inf, and adds 0.
            lowest = torch.finfo(logprobs.dtype).min
            entropy = -(logprobs.exp() * logprobs.clamp(min=lowest)).sum(dim=-1)
        return logprobs.gather(1, targets[:, None]).squeeze(1), entropy

    @contextmanager
    def gradient_in_place(self) -> Iterator[None]:
        """Add gradients of embeddings and output layer directly to their `.grad`.

        So no second matrix of that size exists: the backward pass of what is scored in this context
        adds to the embedding rows of the tokens and, tile by tile, to the output layer. The `.grad`
        must exist before (zeros at the start) and until the backward pass. Autograd does not get
        the output layer's gradient, so hooks such as DDP's do not see it.
        """
        # The embeddings' gradient is sparse here: autograd adds its rows to the dense sum. The
        # output layer's gradient is added tile by tile (`OutputGradient`).
        embeddings: Any = self.model.get_input_embeddings()
        matrices = (
            [embeddings.weight]
            if self.head is None
            else [embeddings.weight, self.head.linear.weight]
        )
        assert all(matrix.grad is not None for matrix in matrices if matrix.requires_grad)
        # On other devices (MPS) PyTorch may lack the operations for sparse gradients.
        by_rows = isinstance(embeddings, torch.nn.Embedding) and self.model.device.type in (
            "cpu",
            "cuda",
        )
        if by_rows:
            embeddings.sparse = True
        self._adds_in_place = True
        try:
            yield
        finally:
            self._adds_in_place = False
            if by_rows:
                embeddings.sparse = False

    @torch.no_grad()
    def logits_in_chunks(
        self, token_ids: TokenIds, *, start: int = 1, chunk_tokens: int | None = None
    ) -> Iterator[Tensor]:
        """Yield the logits `[chunk, vocabulary]` that predict one text's tokens from `start` on,
        divided by the temperature, float32.

        A chunk has `chunk_tokens` tokens, by default as many as `LOGITS_PER_CHUNK` allows. Without
        an output layer all logits exist at once.
        """
        self.language_model.require_one_rope(len(token_ids))
        ids = torch.tensor([token_ids], device=self.model.device)
        predicts = torch.zeros_like(ids, dtype=torch.bool)
        predicts[0, start - 1 : -1] = True
        embeddings: Any = self.model.get_input_embeddings()
        size = chunk_tokens or tokens_per_chunk(self.model.device.type, len(embeddings.weight))
        if self.head is not None:
            distributions = self._distributions({"input_ids": ids}, predicts)
            for rows, _ in distributions.tiles((size, len(embeddings.weight))):
                yield distributions.logits(rows)
            return
        with self.language_model.autocast():
            logits = self.model(input_ids=ids, use_cache=False).logits[predicts]
        for part in logits.split(size):
            yield part.to(float32_or_wider(part.dtype)) / self.temperature

    @torch.no_grad()
    def score(self, prompts: Sequence[TokenIds], completions: Sequence[TokenIds]) -> list[Tensor]:
        """Return the log-probs of each completion, float32 `[its length]` on the CPU, without
        gradient, in the order given."""
        results: list[Tensor] = [torch.empty(0)] * len(prompts)
        batches = self.batches(prompts, completions)
        for rows in batches:
            self.before_work()
            scores = self(
                [prompts[i] for i in rows], [completions[i] for i in rows], with_entropy=False
            )
            # Batches are sorted by length; each result is put back at its own index.
            for i, values, mask in zip(rows, scores.logprobs.cpu(), scores.mask.cpu(), strict=True):
                results[i] = values[mask]
        if self._compares_neighbours:
            self._compare_neighbours(batches, prompts, completions, results)
        return results

    def _compare_neighbours(
        self,
        batches: Sequence[Sequence[int]],
        prompts: Sequence[TokenIds],
        completions: Sequence[TokenIds],
        results: Sequence[Tensor],
    ) -> None:
        """Score the shortest row once more, alone, the first time that a batch has several rows.

        Raises `RunFailedError` if its log-probs differ: such a model's log-probs depend on the
        batch, which nobody would notice for a teacher or a reference.
        """
        shared = [i for rows in batches if len(rows) > 1 for i in rows if completions[i]]
        if not shared:
            return
        self._compares_neighbours = False
        row = min(shared, key=lambda i: len(prompts[i]) + len(completions[i]))
        alone = self([prompts[row]], [completions[row]], with_entropy=False).logprobs[0].cpu()
        difference = float((alone - results[row]).abs().mean())
        limit = NEIGHBOUR_LIMITS[self.language_model.compute_dtype == torch.float32]
        if difference > limit:
            raise RunFailedError(
                f"{self.language_model.name!r} gives a completion other log-probs in a batch than "
                f"alone (by {difference:.2g} nats per token, more than {limit:g} of rounding); use "
                "another model, or set tokens_per_batch = 1, which scores each alone."
            )


def batches_by_length(lengths: Sequence[int], tokens_per_batch: int) -> list[list[int]]:
    """Sort indices by length, longest first, and cut them into batches with rows x longest <=
    tokens_per_batch (at least 1 row)."""
    # The first row of a batch is its longest, so it decides the padded width.
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= tokens_per_batch:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches
