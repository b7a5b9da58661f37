"""The columns of a served teacher: its most likely tokens with their log-probs, or the log-probs of
ids that the student names."""

import heapq
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlad.scoring.columns import TokenColumns
from rlad.teachers.served.protocol import (
    Scoring,
    finite_logprob,
    read_scores,
    read_table,
    scoring_request,
)

LONGEST_ID = 10
"""Digits of a token id; no vocabulary needs more."""


def column_scoring(scoring: Scoring, ids: Tensor | None) -> Scoring:
    """Return the way to ask for columns if single tokens are scored by `scoring`."""
    if ids is not None:
        return "prompt_logprob_token_ids"
    # A table has only requested ids, and the most likely ones are not known yet.
    return "prompt_logprobs" if scoring == "prompt_logprob_token_ids" else scoring


def column_request(
    scoring: Scoring,
    model: str,
    tokens: Sequence[int],
    *,
    start: int,
    temperature: float,
    top_k: int,
    ids: Tensor | None,
) -> dict[str, Any]:
    """Make the request for the columns of the tokens from index `start` on, with `scoring` from
    `column_scoring`."""
    settings: dict[str, Any] = {"start": start, "temperature": temperature}
    if ids is None:
        return scoring_request(scoring, model, tokens, num_likeliest=top_k, **settings)
    return scoring_request(scoring, model, tokens, entries=ids.tolist(), **settings)


def read_columns(
    scoring: Scoring,
    answer: dict[str, Any],
    tokens: Sequence[int],
    *,
    start: int,
    top_k: int,
    ids: Tensor | None,
    vocabulary: int,
) -> TokenColumns:
    """Read the answer to a `column_request`. A token with incomplete columns is NaN.

    `vocabulary` is the student's, which must contain the teacher's most likely tokens.
    """
    if ids is not None:
        rows = read_table(answer, len(tokens) - start)
        if rows is None or len(rows[0]) != top_k:
            return TokenColumns.missing(len(tokens) - start, top_k)
        values = torch.tensor([[finite_logprob(value) for value in row] for row in rows])
        return TokenColumns.without_tail(ids, values, vocabulary=vocabulary)
    found = TokenColumns.missing(len(tokens) - start, top_k)
    scores = read_scores(scoring, answer, tokens, start=start)[start:]
    logprobs = found.logprobs[:, :-1].clone()
    for row, score in enumerate(scores):
        # The sampled token may be listed besides the most likely ones.
        known = [(value, _id_of(name)) for name, value in score.likeliest.items()]
        best = heapq.nlargest(top_k, [pair for pair in known if not math.isnan(pair[0])])
        if len(best) == top_k and all(0 <= token < vocabulary for _, token in best):
            found.ids[row] = torch.tensor([token for _, token in best])
            logprobs[row] = torch.tensor([value for value, _ in best])
    return TokenColumns.without_tail(found.ids, logprobs, vocabulary=vocabulary)


def _id_of(name: str) -> int:
    """Read a token's id; -1 if the token is written in another form."""
    return int(name) if name.isascii() and name.isdigit() and len(name) <= LONGEST_ID else -1
