"""Loss and gradient of `gkd` against those of TRL's `DistillationTrainer`, and of `sdpo` against
those of its experimental `SDPOTrainer`, on one batch."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

from datasets import Dataset
from trl.experimental.sdpo import SDPOConfig, SDPOTrainer
from trl.trainer.distillation_config import DistillationConfig
from trl.trainer.distillation_trainer import DistillationTrainer

from rlad.models.loading import LanguageModel
from rlad.objectives.aggregate import aggregate
from rlad.objectives.divergences import divergence_of, generalised_jsd, sampled_divergence
from rlad.objectives.gkd import gkd_loss
from rlad.objectives.self_distillation import distillation_loss
from rlad.scoring.scorer import Scorer
from rlad.scoring.token_divergence import token_divergence
from rlad.scoring.top_k import top_k_divergence
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


# --- sdpo -----------------------------------------------------------------------------------------

SHOWN = [7, 8, 9]
"""before each prompt of the teacher, which is all that it sees more"""
TOP_K = 5
BOUND = 1.2
"""of the importance weight; some of these weights are larger"""
NAMES = {"forward_kl": 0.0, "jsd": 0.5, "reverse_kl": 1.0}
MODES = {"student_top_k": "topk_logits", "full": "full_logits", "sampled": "sampled_token"}


def sdpo_of_trl(
    student: LanguageModel,
    teacher: LanguageModel,
    old: torch.Tensor,
    folder: Path,
    **settings: Any,
) -> tuple[float, torch.Tensor]:
    known = {name: value for name, value in ARGUMENTS.items() if hasattr(SDPOConfig, name)}
    arguments = SDPOConfig(
        output_dir=str(folder),
        **known
        | {"temperature": TEMPERATURE, "teacher_model_kind": "live", "distillation_weight": 1.0}
        | {"distillation_is_clip": BOUND, **settings},
    )
    trainer: Any = SDPOTrainer(
        model=student.model,
        reward_funcs=lambda completions, **columns: [0.0 for _ in completions],
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": ["w3"]}),
        processing_class=student.tokenizer,
    )
    trainer.teacher_model = teacher.model
    student.model.eval()
    prompt_ids, prompt_mask = padded(PROMPTS, "left")
    completion_ids, completion_mask = padded(COMPLETIONS, "right")
    shown_ids, shown_mask = padded([[*SHOWN, *prompt] for prompt in PROMPTS], "left")
    inputs = {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "completion_ids": completion_ids,
        "completion_mask": completion_mask,
        "teacher_input_ids": torch.cat([shown_ids, completion_ids], dim=1),
        "teacher_attention_mask": torch.cat([shown_mask, completion_mask], dim=1),
        "old_per_token_logps": old,
    }
    student.model.zero_grad()
    loss = trainer.compute_loss(student.model, inputs)
    loss.backward()
    return float(loss.detach()), gradient_of(student)


def sdpo_of_ours(
    student: LanguageModel, teacher: LanguageModel, old: torch.Tensor, support: str, name: Any
) -> tuple[float, torch.Tensor]:
    ours, theirs = (
        Scorer(model, temperature=TEMPERATURE, tokens_per_batch=1000)
        for model in (student, teacher)
    )
    shown = [[*SHOWN, *prompt] for prompt in PROMPTS]
    target = theirs.distributions(shown, COMPLETIONS)
    measure = divergence_of(name)

    def compare(given: Any) -> torch.Tensor:
        if support == "full":
            return token_divergence(given, target, measure, tile=(5, 11))
        return top_k_divergence(given, target, measure, top_k=TOP_K, chosen_by=given, tile=(5, 11))

    scores = ours(PROMPTS, COMPLETIONS, divergence=None if support == "sampled" else compare)
    divergence = scores.divergence
    if divergence is None:
        with torch.no_grad():
            of_teacher = theirs(shown, COMPLETIONS).logprobs
        divergence = sampled_divergence(scores.logprobs, of_teacher, measure)
    losses, stats = distillation_loss(
        student_logprobs=scores.logprobs,
        old_logprobs=old,
        mask=scores.mask,
        divergence_to_teacher=divergence,
        max_importance_weight=BOUND,
    )
    weights = stats["importance_weight"][scores.mask]
    assert float(weights.min()) < 1 and 0 < int((weights == BOUND).sum()) < len(weights)
    loss = aggregate(losses, scores.mask, mode="sequence_mean")
    student.model.zero_grad()
    loss.backward()
    return float(loss.detach()), gradient_of(student)


@pytest.mark.parametrize(
    ("support", "name"),
    [
        *(("student_top_k", name) for name in NAMES),
        *(("full", name) for name in NAMES),
        ("sampled", "reverse_kl"),
    ],
)
def test_sdpo_is_that_of_trl(tmp_path: Path, support: str, name: str) -> None:
    """With `distillation_add_tail`, which TRL leaves off by default (it renormalises the K tokens
    then, which there is not here), and a teacher for every row: TRL counts the others in its mean.
    Of the sampled token it has another value with the same gradient."""
    student = tiny_language_model("llama")
    teacher = tiny_language_model("llama", seed=1)
    before = tiny_language_model("llama", seed=2)
    with torch.no_grad():
        old = Scorer(before, temperature=TEMPERATURE, tokens_per_batch=1000)(PROMPTS, COMPLETIONS)
    settings: dict[str, Any] = {
        "distillation_mode": MODES[support],
        "distillation_alpha": NAMES[name],
        "distillation_topk": TOP_K,
        "distillation_add_tail": True,
    }
    loss, gradient = sdpo_of_ours(student, teacher, old.logprobs, support, name)
    expected, wanted = sdpo_of_trl(student, teacher, old.logprobs, tmp_path, **settings)
    if support != "sampled":
        assert loss == pytest.approx(expected, rel=1e-5) and loss > 0.01
    error = float((gradient - wanted).norm() / wanted.norm())
    print(f"{support} {name}: loss {abs(loss - expected):.1e} gradient {error:.1e}")
    assert error < 1e-5
