"""The same batch of rollouts through three witnesses: the native engine, the tiny loop of `examples/`, and a slow reference.

The reference knows nothing of batches: it takes one sequence after the other through the model, all logits, and adds up the
formulas of `reference.py` token by token. Used by `test_parity.py` and by `benchmarks/parity.py`.
"""

import copy
import importlib.util
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import reference
from rlad.config import RunConfig
from rlad.engines.native import NativeEngine, RolloutBatch, objective_knobs
from rlad.language_model import LanguageModel
from rlad.metrics import TokenStats
from rlad.tasks import Problem, Split
from rlad.tasks.base import Judgement, cannot_judge, judged
from rlad.teachers.local import LocalTeacher
from tiny_models import VOCABULARY, tiny_language_model

Gradients = dict[str, Tensor]
OBJECTIVES: dict[str, dict[str, Any]] = {
    "trrd": {},
    "grpo": {},
    "kdrl": {"kd_coef": 0.05},
    "opd": {},
}


class WordTask:
    """A completion is correct when it holds few high words; some cannot be judged and every third prompt is too easy."""

    name = "words"

    def __init__(self, *, is_judged_in_full: bool = False):
        self.is_judged_in_full = is_judged_in_full

    def problem(self, split: Split, index: int, *, seed: int = 0) -> Problem:
        words = " ".join(f"w{3 + (7 * index + 11 * i) % (VOCABULARY - 3)}" for i in range(1 + index % 5))
        return Problem(prompt=words, answer="", key=str(index), difficulty="easy" if index % 3 == 2 else "fair")

    def num_problems(self, split: Split) -> int | None:
        return None

    def judge(self, problem: Problem, completion: str) -> Judgement:
        numbers = [int(word[1:]) for word in completion.split() if word[0] == "w"]
        if problem.difficulty == "easy":
            return judged(True)
        if not self.is_judged_in_full and sum(numbers) % 7 == 0:
            return cannot_judge("for the test")
        return judged(sum(n > VOCABULARY // 2 for n in numbers) <= len(numbers) // 2)

    def close(self) -> None:
        pass


@dataclass(frozen=True, slots=True)
class Case:
    """A run's engine with the models it was given; `old` is the student before any step."""

    engine: NativeEngine
    teacher: LanguageModel
    reference: LanguageModel
    old: LanguageModel


def make_case(
    objective: str = "trrd",
    *,
    knobs: dict[str, Any] | None = None,
    optimization: dict[str, Any] | None = None,
    rollout: dict[str, Any] | None = None,
    student: dict[str, Any] | None = None,
    family: str = "gpt2",
    dtype: torch.dtype = torch.float64,
    task: WordTask | None = None,
    engine_type: type[NativeEngine] = NativeEngine,
) -> Case:
    """GPT-2 computes in float64 throughout; the norms of Llama turn to float32 whatever the type of its weights."""
    config = RunConfig.model_validate(
        {
            "student": {"model": "tiny"} | (student or {}),
            "teacher": {"model": "tiny"},
            "task": {"type": "knights_and_knaves"},
            "objective": {"type": objective} | OBJECTIVES[objective] | (knobs or {}),
            "rollout": {"prompts_per_batch": 4, "group_size": 4, "max_completion_tokens": 12} | (rollout or {}),
            "optimization": {"tokens_per_batch": 50, "learning_rate": 1e-2} | (optimization or {}),
        }
    )
    # Ends are frequent, so lengths differ.
    language_model = tiny_language_model(family, dtype=dtype, eos_token_ids=tuple(range(1, 10)))
    teacher, initial = nearby(language_model, seed=1), nearby(language_model, seed=2)
    temperature = config.rollout.temperature
    engine = engine_type(
        config,
        student=language_model,
        task=task or WordTask(),
        teacher=LocalTeacher(teacher, temperature=temperature, tokens_per_batch=60),
        reference=initial if config.optimization.kl_coef else None,
    )
    return Case(engine, teacher, initial, nearby(language_model, seed=3, distance=0.0))


def nearby(language_model: LanguageModel, *, seed: int, distance: float = 0.05) -> LanguageModel:
    """A copy whose weights are a little off: its log-probs fall within, at and beyond the clamp of TRRD."""
    model = copy.deepcopy(language_model.model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter), alpha=distance)
    other = (language_model.tokenizer, language_model.eos_token_ids, language_model.pad_token_id, language_model.compute_dtype)
    return LanguageModel("nearby", model.eval(), *other)


def rollouts_of(case: Case, prompts: Collection[int] | None = None) -> list[int]:
    rollout = case.engine.config.rollout
    chosen = range(rollout.prompts_per_batch) if prompts is None else prompts
    return [i for p in chosen for i in range(p * rollout.group_size, (p + 1) * rollout.group_size)]


# --- the engine -------------------------------------------------------------------------------------------------------


def by_engine(case: Case, batch: RolloutBatch, wanted: list[int], stats: TokenStats | None = None) -> tuple[float, Gradients]:
    loss = case.engine.accumulate_gradient(batch, wanted, stats or TokenStats())
    parameters = case.engine.student.model.named_parameters()
    return loss, {name: p.grad.clone() for name, p in parameters if p.grad is not None}


# --- the slow reference -----------------------------------------------------------------------------------------------


def token_logprobs(model: LanguageModel, prompt: list[int], completion: list[int], temperature: float) -> list[Tensor]:
    logits = model.model(input_ids=torch.tensor([prompt + completion])).logits[0].double()
    rows = [(logits[len(prompt) - 1 + t] / temperature).log_softmax(dim=-1) for t in range(len(completion))]
    return [row[token] for row, token in zip(rows, completion, strict=True)]


def by_reference(
    case: Case,
    batch: RolloutBatch,
    wanted: list[int],
    *,
    dropped: Collection[tuple[int, int]] = (),
    teacher_temperature: float = 0,
) -> tuple[float, Gradients]:
    """Every judged rollout (for opd: every one) takes part, also of advantage 0; `dropped` tokens have no teacher value.

    `teacher_temperature` replaces that of the rollouts for the teacher alone, which is a mistake.
    """
    config, student = case.engine.config, case.engine.student
    temperature, loop = config.rollout.temperature, config.optimization
    kl_coef = loop.kl_coef.at(case.engine.step) if not isinstance(loop.kl_coef, float) else loop.kl_coef
    knobs = objective_knobs(config.objective, case.engine.step)
    rows = []
    for i in wanted:
        rollout, prompt = batch.rollouts[i], list(batch.prompts[i])
        if rollout.verdict == "cannot_judge" and config.objective.type != "opd":  # which uses no reward
            continue
        completion, advantage = list(rollout.completion.token_ids), float(batch.advantages[i])
        s_row = token_logprobs(student, prompt, completion, temperature)
        with torch.no_grad():
            o_row = token_logprobs(case.old, prompt, completion, temperature)
            t_row = token_logprobs(case.teacher, prompt, completion, teacher_temperature or temperature)
            r_row = token_logprobs(case.reference, prompt, completion, temperature)
        rows.append(
            [
                objective_token(config.objective.type, knobs, s, o, t, advantage)
                + (kl_coef * reference.kl_token(s, r, "k3") if kl_coef else 0.0)
                for position, (s, o, t, r) in enumerate(zip(s_row, o_row, t_row, r_row, strict=True))
                if (i, position) not in dropped
            ]
        )
    aggregations = {
        "sequence_mean": reference.sequence_mean,
        "token_mean": reference.token_mean,
        "constant_length": lambda rows: reference.constant_length(rows, config.rollout.max_completion_tokens),
    }
    loss = aggregations[loop.aggregation](rows)
    return float(loss.detach()), gradients_of(student, loss)


def objective_token(name: str, knobs: dict[str, Any], s: Tensor, o: Tensor, t: Tensor, advantage: float) -> Any:
    if name == "opd":
        return reference.opd_token(s, o, t)
    clip = {"clip_low": knobs["clip_low"], "clip_high": knobs["clip_high"]}
    if name == "trrd":
        return reference.trrd_token(s, o, t, advantage, alpha=knobs["alpha"], c=knobs["teacher_log_ratio_clip"], **clip)
    loss = reference.grpo_token(s, o, advantage, **clip)
    if name == "kdrl":
        loss = loss + knobs["kd_coef"] * reference.kl_token(s, t, knobs["kd_estimator"])
    return loss


def gradients_of(language_model: LanguageModel, loss: Tensor) -> Gradients:
    names, parameters = zip(*language_model.model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    pairs = zip(names, parameters, gradients, strict=True)
    return {name: torch.zeros_like(p) if gradient is None else gradient for name, p, gradient in pairs}


# --- the tiny loop ----------------------------------------------------------------------------------------------------


def tiny_loop() -> Any:
    path = Path(__file__).parents[1] / "examples" / "02_tiny_loop.py"
    spec = importlib.util.spec_from_file_location("tiny_loop", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def by_tiny_loop(case: Case, batch: RolloutBatch, wanted: list[int], *, alpha: float) -> tuple[float, Gradients]:
    """Left-padded prompts, right-padded completions, its own advantages, full logits; it knows TRRD and the sequence mean."""
    loop, student = tiny_loop(), case.engine.student
    prompts, completions = [batch.prompts[i] for i in wanted], [batch.completions[i] for i in wanted]
    left, right = max(map(len, prompts)), max(map(len, completions))
    ids = torch.tensor(
        [[0] * (left - len(p)) + [*p, *c] + [0] * (right - len(c)) for p, c in zip(prompts, completions, strict=True)]
    )
    prompt_mask = torch.tensor([[0] * (left - len(p)) + [1] * len(p) for p in prompts])
    mask = torch.tensor([[True] * len(c) + [False] * (right - len(c)) for c in completions])
    attention_mask = torch.cat([prompt_mask, mask.long()], dim=1)

    rewards = torch.tensor([batch.rollouts[i].reward for i in wanted], dtype=student.model.dtype)
    advantages = loop.group_advantages(rewards, case.engine.config.rollout.group_size)
    student_logprobs = loop.completion_logprobs(student.model, ids, attention_mask, mask)
    with torch.no_grad():
        teacher_logprobs = loop.completion_logprobs(case.teacher.model, ids, attention_mask, mask)
    loss = loop.trrd(student_logprobs, student_logprobs.detach(), teacher_logprobs, advantages, mask, alpha=alpha)
    return float(loss.detach()), gradients_of(student, loss)


# --- differences ------------------------------------------------------------------------------------------------------


def difference(ours: tuple[float, Gradients], theirs: tuple[float, Gradients]) -> tuple[float, float]:
    """Of the loss |a - b|: its terms are of order 1 and may cancel; of the gradient as one long vector |a - b| / |b|."""
    (loss, gradients), (expected_loss, expected) = ours, theirs
    assert gradients.keys() == expected.keys()
    a, b = (torch.cat([g[name].flatten().double() for name in expected]) for g in (gradients, expected))
    return abs(loss - expected_loss), float((a - b).norm() / b.norm())
