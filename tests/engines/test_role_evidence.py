"""What SRPO knows of a completion: the two further passes of the old policy, each against one
forward pass of transformers over that row alone."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from rlad.config.file import parse_config
from rlad.engines.metrics import TokenStats
from rlad.engines.native.role_evidence import add_role_evidence
from rlad.engines.rollout_batch import RolloutBatch, padded
from rlad.models.pictures import PicturedPrompt
from rlad.objectives import OBJECTIVES
from rlad.objectives.srpo import srpo_loss
from rlad.rollouts.prompts import prompt_token_ids
from rlad.rollouts.types import Completion, Rollout, RolloutGroup
from rlad.scoring.scorer import Scorer
from rlad.seeds import stream_seed
from rlad.tasks import Problem
from tiny_vision import FAMILIES, TAGS, VOCABULARY, picture, tiny_seeing_model

OPENS, CLOSES, THINKS, THOUGHT = range(VOCABULARY - len(TAGS), VOCABULARY)
WHOLE = (OPENS, 20, 21, 22, CLOSES, THINKS, 30, 31, THOUGHT, 40, 1)
BROKEN = (OPENS, 20, 21, THINKS, 30, THOUGHT, 1)
TEMPERATURE = 0.7


def one_row(model: Any, prompt: Any, completion: Any) -> torch.Tensor:
    ids = torch.tensor([[*prompt, *completion]])
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if isinstance(prompt, PicturedPrompt):
        inputs |= model.vision.pixels(prompt.pictures)
        if "image_grid_thw" in inputs:
            inputs["mm_token_type_ids"] = (ids == model.model.config.image_token_id).int()
    with torch.no_grad():
        logits = model.model(**inputs).logits[0, len(prompt) - 1 : -1]
    logprobs = (logits / TEMPERATURE).log_softmax(-1)
    return logprobs.gather(1, torch.tensor(completion)[:, None])[:, 0]


@pytest.mark.parametrize("family", FAMILIES)
def test_evidence_is_the_difference_of_two_passes(family):
    model = tiny_seeing_model(family)
    template = "w50 {prompt}"
    config = parse_config(
        {
            "student": {"model": "tiny"},
            "task": {"type": "scenes"},
            "objective": {
                "type": "srpo", "patch_pixels": 8, "reasoning_template": template
            },
            "rollout": {
                "temperature": TEMPERATURE, "group_size": 3, "max_completion_tokens": 16
            },
        }
    )  # fmt: skip
    problem = Problem("<image> w20 <image> w23", "", "", images=(picture(1), picture(2)))
    prompt = prompt_token_ids(
        model.tokenizer, problem.asked, config.rollout, problem.images, model.vision
    )
    rollouts = tuple(
        Rollout(Completion(ids, (), False), "", verdict, reward)
        for ids, verdict, reward in (
            (WHOLE, "correct", 1.0), (BROKEN, "wrong", 0.0), (WHOLE, "correct", 1.0),
        )
    )  # fmt: skip
    group = RolloutGroup(0, problem, prompt, rollouts)
    batch = RolloutBatch(5, [group], torch.tensor([0.5, -1.0, 0.5]))
    scorer = Scorer(model, temperature=TEMPERATURE, tokens_per_batch=10_000)
    batch.old_logprobs = scorer.score([prompt] * 3, batch.completions)
    add_role_evidence(batch, config.objective, scorer, config)

    assert batch.roles and batch.role_evidence
    assert batch.roles[0].tolist() == [0, 1, 1, 1, 0, 0, 2, 2, 0, 0, 0]
    assert batch.roles[1].tolist() == [0] * len(BROKEN)
    assert batch.role_evidence[1].isnan().all()
    assert batch.counts["objective/parsed/frac"] == pytest.approx(2 / 3)
    old = one_row(model, prompt, WHOLE)
    seen = []
    for i in (0, 2):
        evidence = batch.role_evidence[i]
        assert evidence.isfinite().tolist() == [role > 0 for role in batch.roles[i].tolist()]
        pictures = [
            one.corrupted(edge=8, seed=stream_seed(0, f"blackened/{i}/{n}", 5))
            for n, one in enumerate(problem.images)
        ]
        black = one_row(model, PicturedPrompt(prompt, pictures), WHOLE)
        torch.testing.assert_close(evidence[1:4], (old - black)[1:4], atol=2e-5, rtol=0)
        seen.append(evidence[1:4])
    # Each rollout has squares of its own.
    assert not torch.equal(*seen)
    asked = prompt_token_ids(
        model.tokenizer, f"w50 {problem.prompt}", config.rollout, problem.images, model.vision
    )
    # What is logged of them.
    stats = TokenStats()
    scores = scorer([prompt] * 3, batch.completions)
    inputs = batch.loss_inputs([0, 1, 2], replace(scores, logprobs=scores.logprobs.detach()))
    _, token_stats = srpo_loss(**{name: getattr(inputs, name) for name in OBJECTIVES["srpo"].needs})
    like = scores.logprobs.detach()
    by_role = {"role": padded(batch.roles, like), "role_evidence": inputs.role_evidence}
    stats.add(inputs, scores.entropy, torch.full_like(like, torch.nan), token_stats | by_role)
    logged = stats.summary()
    assert logged["objective/perception_evidence/mean"] == pytest.approx(
        float(torch.cat(seen).mean()), abs=1e-5
    )
    assert 0.8 <= logged["objective/reasoning_weight/mean"] <= 1.2
    alone = one_row(model, asked, WHOLE[5:9])
    torch.testing.assert_close(
        batch.role_evidence[0][6:8], old[6:8] - alone[1:3], atol=2e-5, rtol=0
    )
