"""Held-out evaluation: mean@k and pass@k with bootstrap intervals over problems."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlad.config import RolloutConfig
from rlad.language_model import LanguageModel
from rlad.prompts import check_prompt_length, prompt_token_ids
from rlad.rollouts import Completion
from rlad.sampling import sample
from rlad.seeds import stream_seed
from rlad.tasks import Problem, Split, Task, Verdict

NUM_RESAMPLES = 2_000


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over problems with its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.1%} [{self.low:.1%}, {self.high:.1%}]"


@dataclass(frozen=True, slots=True)
class ProblemResult:
    """How the samples of one held-out problem were judged."""

    index: int
    key: str
    """problems with the same key are variants of one another"""
    difficulty: str
    num_samples: int
    num_correct: int
    num_cannot_judge: int
    num_truncated: int
    mean_completion_tokens: float
    prompt: str
    first_completion: str


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased estimate of P(at least one of k samples is correct): 1 - C(n - c, k) / C(n, k) (arXiv 2107.03374, Eq. 1).

    Raises `ValueError` for k outside 1..n.
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} cannot be estimated from {num_samples} samples; k must lie in 1..{num_samples}.")
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def bootstrap(values: Sequence[float], keys: Sequence[str], *, seed: int = 0) -> Estimate:
    """Mean of per-problem values with the percentile bootstrap interval (95 %).

    Problems of the same key are variants of one another, so keys are resampled with replacement, each with all its problems:
    two puzzles of one structure are not two independent observations.
    """
    _, cluster = np.unique(keys, return_inverse=True)
    sums, sizes = np.bincount(cluster, weights=np.asarray(values, dtype=float)), np.bincount(cluster)
    draws = np.random.default_rng(seed).integers(len(sums), size=(NUM_RESAMPLES, len(sums)))
    low, high = np.quantile(sums[draws].sum(axis=1) / sizes[draws].sum(axis=1), (0.025, 0.975))
    mean = float(np.mean(values))
    return Estimate(mean, min(float(low), mean), max(float(high), mean))  # equal values round differently in another order


def evaluate(
    language_model: LanguageModel,
    task: Task,
    split: Split,
    *,
    rollout: RolloutConfig,
    num_problems: int,
    num_samples: int,
    temperature: float,
    before_token: Callable[[], None] = lambda: None,
) -> list[ProblemResult]:
    """Sample and grade the first `num_problems` problems of a split, with the prompt format and the limits of `rollout`.

    Prompts and sampling seeds are the same for every run and model, so two results can be compared prompt by prompt.
    Raises `ValueError` for a prompt that leaves no room for its completion.
    """
    available = task.num_problems(split)
    indices = range(num_problems if available is None else min(num_problems, available))
    problems = [task.problem(split, i) for i in indices]
    prompts = [prompt_token_ids(language_model.tokenizer, p.prompt, rollout.prompt_format) for p in problems]
    for i, prompt in zip(indices, prompts, strict=True):
        check_prompt_length(len(prompt), f"{split} problem {i}", rollout, language_model.context_tokens)
    groups = sample(
        language_model,
        prompts,
        group_size=num_samples,
        max_completion_tokens=rollout.max_completion_tokens,
        temperature=temperature,
        seed=stream_seed(0, "evaluation", split),
        max_batch_rows=rollout.max_batch_rows,
        before_token=before_token,
    )
    graded = zip(indices, problems, groups, strict=True)
    return [_grade(language_model, task, index, problem, group) for index, problem, group in graded]


def _grade(
    language_model: LanguageModel, task: Task, index: int, problem: Problem, completions: Sequence[Completion]
) -> ProblemResult:
    texts = language_model.tokenizer.batch_decode([list(c.token_ids) for c in completions], skip_special_tokens=True)
    verdicts = [task.judge(problem, text).verdict for text in texts]
    return ProblemResult(
        index=index,
        key=problem.key,
        difficulty=problem.difficulty,
        num_samples=len(completions),
        num_correct=verdicts.count(Verdict.CORRECT),
        num_cannot_judge=verdicts.count(Verdict.CANNOT_JUDGE),
        num_truncated=sum(c.is_truncated for c in completions),
        mean_completion_tokens=sum(len(c.token_ids) for c in completions) / len(completions),
        prompt=problem.prompt,
        first_completion=texts[0],
    )


def pass_at_1(results: Sequence[ProblemResult]) -> Estimate:
    """pass@1 (= mean@k): the share of correct samples, averaged over problems."""
    return bootstrap([r.num_correct / r.num_samples for r in results], [r.key for r in results])


def summarise(results: Sequence[ProblemResult]) -> dict[str, Any]:
    """mean@k, pass@k for k = 1, 2, 4, ... up to the number of samples, and pass@1 by difficulty; each with its interval.

    A completion that could not be judged counts as not correct.
    """
    if not results:
        raise ValueError("there are no results to summarise; evaluate at least one problem.")
    n = results[0].num_samples

    def estimate(k: int, chosen: Sequence[ProblemResult] = results) -> Estimate:
        return bootstrap([pass_at_k(n, r.num_correct, k) for r in chosen], [r.key for r in chosen])

    difficulties = sorted({r.difficulty for r in results} - {""})
    ks = sorted({n, *(2**i for i in range(n.bit_length()) if 2**i <= n)})
    return {
        "num_problems": len(results),
        "num_samples": n,
        f"mean@{n}": estimate(1),
        "pass@k": {k: estimate(k) for k in ks},
        "pass@1 by difficulty": {name: estimate(1, [r for r in results if r.difficulty == name]) for name in difficulties},
        "mean_completion_tokens": sum(r.mean_completion_tokens for r in results) / len(results),
        "truncated_share": sum(r.num_truncated for r in results) / (n * len(results)),
        "cannot_judge_share": sum(r.num_cannot_judge for r in results) / (n * len(results)),
    }
