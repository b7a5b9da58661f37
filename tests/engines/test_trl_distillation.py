"""Loss and gradient of `gkd` against those of TRL's `DistillationTrainer` on one batch."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

from datasets import Dataset
from trl.trainer.distillation_config import DistillationConfig
from trl.trainer.distillation_trainer import DistillationTrainer

from rlad.models.loading import LanguageModel
from rlad.objectives.aggregate import aggregate
from rlad.objectives.divergences import generalised_jsd
from rlad.objectives.gkd import gkd_loss
from rlad.scoring.scorer import Scorer
from rlad.scoring.token_divergence import token_divergence
from tiny_models import PAD, random_tokens, tiny_language_model
from trl_runs import ARGUMENTS

TEMPERATURE = 0.7
PROMPTS = random_tokens(7, 3, 2, 12, 5, seed=1)
COMPLETIONS = random_tokens(4, 9, 6, 1, 8, seed=2)


def padded(rows: list[list[int]], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    gaps = [[0] * (width - len(row)) for row in rows]
    full = [[1] * len(row) for row in rows]
    both = [
        (gap, one) if side == "left" else (one, gap) for gap, one in zip(gaps, full, strict=True)
    ]
    mask = torch.tensor([first + second for first, second in both])
    ids = torch.full(mask.shape, PAD)
    return ids.masked_scatter(
        mask.bool(), torch.tensor([token for row in rows for token in row])
    ), mask


def by_trl(
    student: LanguageModel, teacher: LanguageModel, beta: float, folder: Path
) -> tuple[float, torch.Tensor]:
    known = {name: value for name, value in ARGUMENTS.items() if hasattr(DistillationConfig, name)}
    arguments = DistillationConfig(
        output_dir=str(folder), **known | {"beta": beta, "temperature": TEMPERATURE}
    )
    trainer: Any = DistillationTrainer(
        model=student.model,
        teacher_model=teacher.model,
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": ["w3"]}),
        processing_class=student.tokenizer,
    )
    prompt_ids, prompt_mask = padded(PROMPTS, "left")
    completion_ids, completion_mask = padded(COMPLETIONS, "right")
    inputs = {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "completion_ids": completion_ids,
        "completion_mask": completion_mask,
    }
    student.model.zero_grad()
    loss, _, _ = trainer._compute_loss(student.model, inputs, completion_mask.sum())
    loss.backward()
    return float(loss.detach()), gradient_of(student)


def gradient_of(model: LanguageModel) -> torch.Tensor:
    parameters = list(model.model.parameters())
    assert all(parameter.grad is not None for parameter in parameters)
    return torch.cat([p.grad.flatten().clone() for p in parameters if p.grad is not None])


def by_us(
    student: LanguageModel, teacher: LanguageModel, beta: float
) -> tuple[float, torch.Tensor]:
    ours, theirs = (
        Scorer(model, temperature=TEMPERATURE, tokens_per_batch=1000)
        for model in (student, teacher)
    )
    target = theirs.distributions(PROMPTS, COMPLETIONS)
    measure = partial(generalised_jsd, beta=beta)
    scores = ours(
        PROMPTS,
        COMPLETIONS,
        divergence=lambda given: token_divergence(given, target, measure, tile=(5, 11)),
    )
    assert scores.divergence is not None
    losses, _ = gkd_loss(divergence_to_teacher=scores.divergence, mask=scores.mask)
    loss = aggregate(losses, scores.mask, mode="token_mean")
    student.model.zero_grad()
    loss.backward()
    return float(loss.detach()), gradient_of(student)


@pytest.mark.parametrize("family", ["llama", "cohere"])
@pytest.mark.parametrize("beta", [0.0, 0.2, 0.5, 1.0])
def test_value_and_gradient_are_those_of_trl(tmp_path: Path, beta: float, family: str) -> None:
    """TRL pads prompts on the left; its logits and sums are float32."""
    settings = {} if family == "llama" else {"logit_scale": 0.3}
    student = tiny_language_model(family, **settings)
    teacher = tiny_language_model("gemma2", seed=1, final_logit_softcapping=5.0, hidden_size=48)
    loss, gradient = by_us(student, teacher, beta)
    expected, wanted = by_trl(student, teacher, beta, tmp_path)
    assert loss == pytest.approx(expected, rel=1e-5) and loss > 0.1
    assert float((gradient - wanted).norm() / wanted.norm()) < 1e-5
