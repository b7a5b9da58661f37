"""The same batch of rollouts through three witnesses: the native engine, the tiny loop of
`examples/`, and a slow reference.

The reference knows nothing of batches: it takes one sequence after the other through the model, all
logits, and adds up the formulas of `reference.py` token by token. Advantages and the values of the
knobs are its own too. Used by `test_parity.py` and by `benchmarks/parity.py`.
"""

import copy
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import reference
from loaded_scripts import load_script
from rlad.config.run import RunConfig
from rlad.engines.metrics import TokenStats
from rlad.engines.native.loop import NativeEngine
from rlad.engines.rollout_batch import RolloutBatch
from rlad.models.loading import LanguageModel
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
    "rlsd": {},
    "distilled_rl": {},
    "topd": {},
    "skill_sd": {"kd_coef": 0.05, "teacher_log_ratio_clip": "off", "max_importance_weight": "off"},
}
"""What the configs of these tests say of each objective."""
_CLIP = {"clip_low": 0.2, "clip_high": 0.28}
DEFAULTS: dict[str, dict[str, Any]] = {
    "trrd": {"alpha": 0.5, "teacher_log_ratio_clip": 1.0, **_CLIP},
    "grpo": _CLIP,
    "kdrl": {"kd_coef": 2e-3, "kd_estimator": "k2", "top_k": 100, **_CLIP},
    "opd": {},
    "rlsd": {
        "teacher_weight": {"start": 0.5, "end": 0.0, "change_per_step": -0.01},
        "weight_clip": 0.2,
        **_CLIP,
    },
    "distilled_rl": {"weight_bound": 3.0, **_CLIP},
    "topd": {"alpha": 0.1, **_CLIP},
    "skill_sd": {
        "kd_coef": 1e-3,
        "teacher_log_ratio_clip": 5.0,
        "max_importance_weight": 2.0,
        **_CLIP,
    },
    "sft": {},
    "gkd": {"beta": 0.5, "support": "full", "top_k": 100},
}
"""What a config that says nothing means: the papers' numbers, written down once more."""
USE_NO_REWARD = ("opd", "topd", "gkd")
Positions = Collection[tuple[int, int]]
Floats = list[float]


class WordTask:
    """A completion is correct when it holds few high words; some cannot be judged and every third
    prompt is too easy."""

    name = "words"

    def __init__(self, *, is_judged_in_full: bool = False):
        self.is_judged_in_full = is_judged_in_full

    def problem(self, split: Split, index: int, *, seed: int = 0) -> Problem:
        words = " ".join(
            f"w{3 + (7 * index + 11 * i) % (VOCABULARY - 3)}" for i in range(1 + index % 5)
        )
        return Problem(
            prompt=words, answer="", key=str(index), difficulty="easy" if index % 3 == 2 else "fair"
        )

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


class EqualPrompts(WordTask):
    """For what pads prompts on the left, upon which GPT-2 counts its positions from the padding on:
    there is none."""

    def problem(self, split: Split, index: int, *, seed: int = 0) -> Problem:
        words = " ".join(f"w{3 + (7 * index + 11 * i) % 61}" for i in range(4))
        return Problem(
            prompt=words, answer="", key=str(index), difficulty="easy" if index % 3 == 2 else "fair"
        )


@dataclass(frozen=True, slots=True)
class Case:
    """A run's engine with the models it was given; `old` is the student before any step, `said`
    what its config says."""

    engine: NativeEngine
    said: dict[str, Any]
    teacher: LanguageModel
    reference: LanguageModel
    old: LanguageModel
    teacher_rows: Callable[[RolloutBatch, int, float], list[Floats]] | None = None
    """the log-probs of the vocabulary at each token of a rollout, at a temperature, where `teacher`
    is not all that the engine's teacher is"""

    def of_teacher(self, batch: RolloutBatch, i: int, temperature: float) -> list[Floats]:
        if self.teacher_rows is not None:
            return self.teacher_rows(batch, i, temperature)
        sequence = list(batch.prompts[i]), list(batch.completions[i])
        with torch.no_grad():
            rows = distributions(self.teacher, *sequence, temperature)
        return [row.tolist() for row in rows]


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
    """GPT-2 computes in float64 throughout; the norms of Llama turn to float32 whatever the type of
    its weights."""
    said: dict[str, Any] = {
        "student": {"model": "tiny"} | (student or {}),
        "teacher": {"model": "tiny"},
        "task": {"type": "knights_and_knaves"},
        "objective": {"type": objective} | OBJECTIVES.get(objective, {}) | (knobs or {}),
        "rollout": {"prompts_per_batch": 4, "group_size": 4, "max_completion_tokens": 12}
        | (rollout or {}),
        "optimization": {"tokens_per_batch": 50, "learning_rate": 1e-2} | (optimization or {}),
    }
    config = RunConfig.model_validate(said)
    # Ends are frequent, so lengths differ.
    language_model = tiny_language_model(family, dtype=dtype, eos_token_ids=tuple(range(1, 10)))
    teacher = nearby(language_model, seed=1)
    initial = nearby(language_model, seed=2)
    temperature = config.rollout.temperature
    engine = engine_type(
        config,
        student=language_model,
        task=task or WordTask(),
        teacher=LocalTeacher(teacher, temperature=temperature, tokens_per_batch=60),
        reference=initial if config.optimization.kl_coef else None,
    )
    return Case(engine, said, teacher, initial, nearby(language_model, seed=3, distance=0.0))


def nearby(language_model: LanguageModel, *, seed: int, distance: float = 0.05) -> LanguageModel:
    """A copy whose weights are a little off: its log-probs fall within, at and beyond the clamp of
    TRRD."""
    model = copy.deepcopy(language_model.model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(
                torch.randn(parameter.shape, generator=generator).to(parameter), alpha=distance
            )
    other = (
        language_model.tokenizer,
        language_model.eos_token_ids,
        language_model.pad_token_id,
        language_model.compute_dtype,
    )
    return LanguageModel("nearby", model.eval(), *other)


def rollouts_of(case: Case, prompts: Collection[int] | None = None) -> list[int]:
    rollout = case.engine.config.rollout
    chosen = range(rollout.prompts_per_batch) if prompts is None else prompts
    return [i for p in chosen for i in range(p * rollout.group_size, (p + 1) * rollout.group_size)]


# --- the engine -----------------------------------------------------------------------------------


def by_engine(
    case: Case, batch: RolloutBatch, wanted: list[int], stats: TokenStats | None = None
) -> tuple[float, Gradients]:
    loss = case.engine.accumulate_gradient(batch, wanted, stats or TokenStats())
    parameters = case.engine.student.model.named_parameters()
    return loss, {name: p.grad.clone() for name, p in parameters if p.grad is not None}


# --- the slow reference ---------------------------------------------------------------------------


def token_logprobs(
    model: LanguageModel, prompt: list[int], completion: list[int], temperature: float
) -> list[Tensor]:
    rows = distributions(model, prompt, completion, temperature)
    return [row[token] for row, token in zip(rows, completion, strict=True)]


def distributions(
    model: LanguageModel, prompt: list[int], completion: list[int], temperature: float
) -> list[Tensor]:
    """The log-probs of the whole vocabulary at each token."""
    logits = model.model(input_ids=torch.tensor([prompt + completion])).logits[0].double()
    return [
        (logits[len(prompt) - 1 + t] / temperature).log_softmax(dim=-1)
        for t in range(len(completion))
    ]


@dataclass(frozen=True, slots=True)
class Row:
    """The tokens of one rollout that train: log-probs of student (with gradient), old policy,
    teacher and reference."""

    student: list[Tensor]
    old: Floats
    teacher: Floats
    reference: Floats
    kept: list[int]
    """their positions"""


def by_reference(
    case: Case,
    batch: RolloutBatch,
    wanted: list[int],
    *,
    dropped: Positions = (),
    teacher_temperature: float = 0,
    objective: str | None = None,
) -> tuple[float, Gradients]:
    """Every judged rollout (of an objective without reward: every one; of `sft` with rejection:
    every correct one) takes part, also of advantage 0.

    It reads from the batch what the student sampled and how it was judged, and no more. `dropped`
    tokens have no teacher value. `teacher_temperature` replaces that of the rollouts for the
    teacher alone, which is a mistake. `objective` is the run's unless said.
    """
    said = case.said
    step = case.engine.step
    student = case.engine.student
    name = objective or said["objective"]["type"]
    aggregation = said["optimization"].get("aggregation", "sequence_mean")
    kl_coef = reference.annealed(said["optimization"].get("kl_coef", 0.0), step)
    allowed = {"correct", "wrong"}
    if name == "sft" and said["objective"].get("rejection", True):
        allowed = {"correct"}
    elif name in (*USE_NO_REWARD, "sft"):
        allowed |= {"cannot_judge"}
    takes_part = [i for i in wanted if batch.rollouts[i].verdict in allowed]
    if name in USE_NO_REWARD:  # without the teacher there is nothing to train on
        takes_part = [i for i in takes_part if teacher_speaks(case, batch, i)]
    rows = {i: _row(case, batch, i, dropped, teacher_temperature) for i in takes_part}
    losses = []
    for i, token_losses in _token_losses(
        case, batch, rows, name, expected_knobs(case, name)
    ).items():
        if kl_coef:
            leash = (
                reference.kl_token(s, r, "k3")
                for s, r in zip(rows[i].student, rows[i].reference, strict=True)
            )
            token_losses = [
                loss + kl_coef * kl for loss, kl in zip(token_losses, leash, strict=True)
            ]
        losses.append(token_losses)
    aggregations = {
        "sequence_mean": reference.sequence_mean,
        "token_mean": reference.token_mean,
        "constant_length": lambda rows: reference.constant_length(
            rows, said["rollout"]["max_completion_tokens"]
        ),
    }
    loss = aggregations[aggregation](losses)
    return float(loss.detach()), gradients_of(student, loss)


def expected_knobs(case: Case, name: str) -> dict[str, Any]:
    """What the config means at the engine's present step, by the table above and not by the
    engine's own reading."""
    said = {key: value for key, value in case.said["objective"].items() if key in DEFAULTS[name]}
    knobs = {
        key: reference.annealed(value, case.engine.step)
        for key, value in (DEFAULTS[name] | said).items()
    }
    return {key: None if value == "off" else value for key, value in knobs.items()}


def expected_advantages(case: Case, batch: RolloutBatch) -> Floats:
    """By rollout, from rewards and verdicts."""
    size = case.said["rollout"]["group_size"]
    scale = case.said["optimization"].get("advantage_scale", "std")
    rewards = [
        None if rollout.verdict == "cannot_judge" else rollout.reward for rollout in batch.rollouts
    ]
    groups = [rewards[start : start + size] for start in range(0, len(rewards), size)]
    return [
        advantage
        for group in groups
        for advantage in reference.group_advantages(group, scale=scale)
    ]


def _row(
    case: Case, batch: RolloutBatch, i: int, dropped: Positions, teacher_temperature: float
) -> Row:
    temperature = case.said["rollout"].get("temperature", 1.0)
    prompt = list(batch.prompts[i])
    completion = list(batch.completions[i])
    kept = [position for position in range(len(completion)) if (i, position) not in dropped]

    def floats(model: LanguageModel, temperature: float) -> Floats:
        with torch.no_grad():
            scores = token_logprobs(model, prompt, completion, temperature)
        return [float(scores[position]) for position in kept]

    scores = token_logprobs(case.engine.student, prompt, completion, temperature)
    return Row(
        [scores[position] for position in kept],
        floats(case.old, temperature),
        floats(case.teacher, teacher_temperature or temperature),
        floats(case.reference, temperature),
        kept,
    )


def _token_losses(
    case: Case, batch: RolloutBatch, rows: dict[int, Row], name: str, knobs: dict[str, Any]
) -> dict[int, list[Tensor]]:
    """Of every row the losses of its tokens, without the KL leash."""
    advantages = expected_advantages(case, batch)
    results = {}
    clip = {key: knobs[key] for key in _CLIP if key in knobs}
    for i, row in rows.items():
        tokens = list(zip(row.student, row.old, row.teacher, strict=True))
        if not teacher_speaks(case, batch, i):
            results[i] = [reference.grpo_token(s, o, advantages[i], **clip) for s, o, _ in tokens]
        elif name == "sft":
            results[i] = [-s for s in row.student]
        elif name == "gkd":
            results[i] = _divergences(case, batch, i, row, **knobs)
        elif name == "opd":
            results[i] = [reference.opd_token(*token) for token in tokens]
        elif name == "trrd":
            trrd = {"alpha": knobs["alpha"], "c": knobs["teacher_log_ratio_clip"]}
            results[i] = [
                reference.trrd_token(*token, advantages[i], **trrd, **clip) for token in tokens
            ]
        else:
            per_token = _advantages_of_tokens(case, rows, i, name, knobs, advantages[i])
            results[i] = [
                reference.grpo_token(s, o, a, **clip)
                for (s, o, _), a in zip(tokens, per_token, strict=True)
            ]
        if name == "skill_sd" and teacher_speaks(case, batch, i):
            kl = [reference.skill_token(*token, c=None, bound=None) for token in tokens]
            results[i] = [
                loss + knobs["kd_coef"] * value for loss, value in zip(results[i], kl, strict=True)
            ]
        if name == "kdrl" and teacher_speaks(case, batch, i):
            support = {"exact": "full", "top_k": "student_top_k"}.get(knobs["kd_estimator"])
            if support:
                kl = _divergences(case, batch, i, row, 1.0, support, knobs["top_k"])
            else:
                kl = [reference.kl_token(s, t, knobs["kd_estimator"]) for s, _, t in tokens]
            results[i] = [
                loss + knobs["kd_coef"] * value for loss, value in zip(results[i], kl, strict=True)
            ]
    return results


def _divergences(
    case: Case, batch: RolloutBatch, i: int, row: Row, beta: float, support: str, top_k: int
) -> list[Tensor]:
    temperature = case.said["rollout"].get("temperature", 1.0)
    completion = list(batch.completions[i])
    sequence = list(batch.prompts[i]), completion, temperature
    ours = distributions(case.engine.student, *sequence)
    theirs = case.of_teacher(batch, i, temperature)
    return [
        reference.divergence(list(s), t, token, beta=beta, support=support, top_k=top_k)
        for position, (s, t, token) in enumerate(zip(ours, theirs, completion, strict=True))
        if position in row.kept
    ]


def _advantages_of_tokens(
    case: Case, rows: dict[int, Row], i: int, name: str, knobs: dict[str, Any], advantage: float
) -> Floats:
    """What stands in GRPO's loss for the advantage of each token of a row."""
    row = rows[i]
    size = case.said["rollout"]["group_size"]
    if name == "topd":
        group = [j for j in range(i - i % size, i - i % size + size) if j in rows]
        old = [rows[j].old for j in group]
        teacher = [rows[j].teacher for j in group]
        return reference.topd_advantages(old, teacher, alpha=knobs["alpha"])[group.index(i)]
    weights = [1.0] * len(row.old)
    if name == "rlsd":
        evidence = {key: knobs[key] for key in ("teacher_weight", "weight_clip")}
        weights = [
            reference.rlsd_weight(o, t, advantage, **evidence)
            for o, t in zip(row.old, row.teacher, strict=True)
        ]
    if name == "distilled_rl" and row.old:
        bound = knobs["weight_bound"]
        weights = reference.distilled_rl_weights(
            row.old, row.teacher, advantage, weight_bound=bound
        )
    return [advantage * weight for weight in weights]


def teacher_speaks(case: Case, batch: RolloutBatch, i: int) -> bool:
    """Whether the teacher has a say on a rollout."""
    size = case.said["rollout"]["group_size"]
    verdicts = [rollout.verdict for rollout in batch.rollouts]
    of_group = verdicts[i - i % size : i - i % size + size]
    return {
        "all": True,
        "positive": expected_advantages(case, batch)[i] > 0,
        "wrong": verdicts[i] != "correct",
        "failed_groups": "correct" not in of_group,
    }[case.said["objective"].get("teacher_on", "all")]


def gradients_of(language_model: LanguageModel, loss: Tensor) -> Gradients:
    names, parameters = zip(*language_model.model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    pairs = zip(names, parameters, gradients, strict=True)
    return {
        name: torch.zeros_like(p) if gradient is None else gradient for name, p, gradient in pairs
    }


# --- the tiny loop --------------------------------------------------------------------------------


def tiny_loop() -> Any:
    return load_script(Path(__file__).parents[1] / "examples" / "02_tiny_loop.py")


def by_tiny_loop(
    case: Case, batch: RolloutBatch, wanted: list[int], *, alpha: float
) -> tuple[float, Gradients]:
    """Left-padded prompts, right-padded completions, its own advantages, full logits; it knows TRRD
    and the sequence mean."""
    loop = tiny_loop()
    student = case.engine.student
    prompts = [batch.prompts[i] for i in wanted]
    completions = [batch.completions[i] for i in wanted]
    left = max(map(len, prompts))
    right = max(map(len, completions))
    ids = torch.tensor(
        [
            [0] * (left - len(p)) + [*p, *c] + [0] * (right - len(c))
            for p, c in zip(prompts, completions, strict=True)
        ]
    )
    prompt_mask = torch.tensor([[0] * (left - len(p)) + [1] * len(p) for p in prompts])
    mask = torch.tensor([[True] * len(c) + [False] * (right - len(c)) for c in completions])
    attention_mask = torch.cat([prompt_mask, mask.long()], dim=1)

    rewards = torch.tensor([batch.rollouts[i].reward for i in wanted], dtype=student.model.dtype)
    advantages = loop.group_advantages(rewards, case.engine.config.rollout.group_size)
    student_logprobs = loop.completion_logprobs(student.model, ids, attention_mask, mask)
    with torch.no_grad():
        teacher_logprobs = loop.completion_logprobs(case.teacher.model, ids, attention_mask, mask)
    loss = loop.trrd(
        student_logprobs, student_logprobs.detach(), teacher_logprobs, advantages, mask, alpha=alpha
    )
    return float(loss.detach()), gradients_of(student, loss)


# --- differences ----------------------------------------------------------------------------------


def difference(
    ours: tuple[float, Gradients], theirs: tuple[float, Gradients]
) -> tuple[float, float]:
    """Of the loss |a - b|: its terms are of order 1 and may cancel; of the gradient as one long
    vector |a - b| / |b|."""
    (loss, gradients) = ours
    (expected_loss, expected) = theirs
    assert gradients.keys() == expected.keys()
    a, b = (
        torch.cat([g[name].flatten().double() for name in expected]) for g in (gradients, expected)
    )
    return abs(loss - expected_loss), float((a - b).norm() / b.norm())
