"""The two additional scoring passes of `srpo`: log-probs of the old policy without the evidence of
each role.

    perception    with a picture whose squares are partly blackened
    reasoning     with a prompt for the reasoning only, without the perception
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlad.config.run import RunConfig
from rlad.engines.rollout_batch import RolloutBatch
from rlad.models.loading import LanguageModel
from rlad.models.pictures import PicturedPrompt
from rlad.rollouts.prompts import reasoning_prompt
from rlad.rollouts.roles import ROLES, RoleSpans, role_spans
from rlad.scoring.scorer import Scorer
from rlad.seeds import stream_seed


def add_role_evidence(
    batch: RolloutBatch, objective: Any, scorer: Scorer, config: RunConfig
) -> None:
    """Fill `role_evidence` and `roles` of the rollouts that train; their old log-probs are known.

    Completions that do not parse, and perceptions of problems without pictures, have no role.
    """
    assert batch.old_logprobs is not None
    student = scorer.language_model
    rows = batch.training_rows
    found = {i: role_spans(batch.completions[i], _decoder(student)) for i in rows}
    spans = {i: one for i, one in found.items() if one is not None}
    evidence = [torch.full_like(values, torch.nan) for values in batch.old_logprobs]
    roles = [torch.zeros_like(values) for values in batch.old_logprobs]
    for i, values in _without_picture(batch, spans, scorer, objective, config).items():
        _enter(
            evidence[i],
            roles[i],
            batch.old_logprobs[i],
            values,
            spans[i].perception,
            ROLES["perception"],
        )
    for i, values in _without_perception(batch, spans, scorer, config).items():
        _enter(
            evidence[i],
            roles[i],
            batch.old_logprobs[i],
            values,
            spans[i].reasoning,
            ROLES["reasoning"],
        )
    batch.role_evidence = evidence
    batch.roles = roles
    if rows:
        batch.counts["objective/parsed/frac"] = len(spans) / len(rows)


def _decoder(student: LanguageModel) -> Any:
    """Return a decoder that keeps special tokens, since tags may be special tokens."""
    tokenizer: Any = student.tokenizer
    return lambda ids: tokenizer.decode(
        ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
    )


def _enter(
    evidence: Tensor, roles: Tensor, old: Tensor, without: Tensor, span: range, role: int
) -> None:
    """Store the contrast of a span; `without` has the log-probs without evidence."""
    part = slice(span.start, span.stop)
    evidence[part] = old[part] - without
    roles[part] = role


def _without_picture(
    batch: RolloutBatch,
    spans: dict[int, RoleSpans],
    scorer: Scorer,
    objective: Any,
    config: RunConfig,
) -> dict[int, Tensor]:
    """Score the perceptions with blackened squares in the picture, drawn anew for each rollout."""
    prompts: dict[int, PicturedPrompt] = {}
    for i in spans:
        prompt = batch.prompts[i]
        if isinstance(prompt, PicturedPrompt):
            pictures = [
                picture.corrupted(
                    edge=objective.patch_pixels,
                    seed=stream_seed(config.seed, f"blackened/{i}/{number}", batch.index),
                )
                for number, picture in enumerate(prompt.pictures)
            ]
            # The size and grid do not change, so neither do the picture's tokens.
            prompts[i] = PicturedPrompt(prompt, pictures)
    until = {i: batch.completions[i][: spans[i].perception.stop] for i in prompts}
    scores = scorer.score(list(prompts.values()), list(until.values()))
    return {
        i: values[spans[i].perception.start :] for i, values in zip(prompts, scores, strict=True)
    }


def _without_perception(
    batch: RolloutBatch, spans: dict[int, RoleSpans], scorer: Scorer, config: RunConfig
) -> dict[int, Tensor]:
    """Score the reasoning after its own prompt, from its tag on, as if nothing came before it."""
    student = scorer.language_model
    prompts: dict[int, Sequence[int]] = {}
    asked: dict[int, Sequence[int]] = {}
    for i in spans:
        group = i // batch.group_size
        if group not in asked:
            one = batch.groups[group]
            what = f"training problem {one.problem_index}"
            asked[group] = reasoning_prompt(
                config,
                one.problem,
                what,
                student.tokenizer,
                student.context_tokens,
                student.vision,
            )
        prompts[i] = asked[group]
    parts = {
        i: batch.completions[i][spans[i].reasoning_opens : spans[i].reasoning.stop] for i in spans
    }
    scores = scorer.score(list(prompts.values()), list(parts.values()))
    return {
        i: values[spans[i].reasoning.start - spans[i].reasoning_opens :]
        for i, values in zip(prompts, scores, strict=True)
    }
