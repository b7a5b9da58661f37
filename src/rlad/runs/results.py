"""Results of held-out problems, and mean@k and pass@k of them with intervals. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlad.errors import UserError
from rlad.runs.statistics import Estimate, bootstrap, pass_at_k


@dataclass(frozen=True, slots=True)
class ProblemResult:
    """The verdicts on the samples of one held-out problem."""

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


def pass_at_1(results: Sequence[ProblemResult]) -> Estimate:
    """Estimate pass@1 (= mean@k), the share of correct samples, averaged over problems."""
    return bootstrap([r.num_correct / r.num_samples for r in results], [r.key for r in results])


def ks_up_to(num_samples: int) -> list[int]:
    """List the k of pass@k that are reported: 1, 2, 4, ... and the number of samples itself."""
    return sorted(
        {num_samples, *(2**i for i in range(num_samples.bit_length()) if 2**i <= num_samples)}
    )


def summarise(results: Sequence[ProblemResult]) -> dict[str, Any]:
    """Estimate mean@k, pass@k for k = 1, 2, 4, ... up to the number of samples, and pass@1 by
    difficulty; each with its interval.

    A completion that could not be judged counts as not correct.
    """
    if not results:
        raise UserError("there are no results to summarise; evaluate at least one problem.")
    n = results[0].num_samples

    def estimate(k: int, chosen: Sequence[ProblemResult] = results) -> Estimate:
        return bootstrap([pass_at_k(n, r.num_correct, k) for r in chosen], [r.key for r in chosen])

    difficulties = sorted({r.difficulty for r in results} - {""})
    return {
        "num_problems": len(results),
        "num_samples": n,
        f"mean@{n}": estimate(1),
        "pass@k": {k: estimate(k) for k in ks_up_to(n)},
        "pass@1 by difficulty": {
            name: estimate(1, [r for r in results if r.difficulty == name]) for name in difficulties
        },
        "mean_completion_tokens": sum(r.mean_completion_tokens for r in results) / len(results),
        "truncated_share": sum(r.num_truncated for r in results) / (n * len(results)),
        "cannot_judge_share": sum(r.num_cannot_judge for r in results) / (n * len(results)),
    }
