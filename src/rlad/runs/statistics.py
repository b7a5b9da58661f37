"""Estimates with intervals, paired comparisons of methods, and pass@k. This file works on numbers
only, without models or run directories.

Held-out results of one method are a table `values[seed][problem]`; `keys[problem]` names the
cluster: problems with the same key are variants of one another, not independent observations.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray
from pydantic import FiniteFloat

NUM_RESAMPLES = 2_000
NUM_PERMUTATIONS = 9_999
LEVEL = 0.95

Floats = NDArray[np.float64]
Table = Sequence[Sequence[float]]
Limits = tuple[float, float]
NO_LIMITS: Limits = (-math.inf, math.inf)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with its 95 % interval."""

    mean: FiniteFloat
    low: FiniteFloat
    high: FiniteFloat

    def __str__(self) -> str:
        return f"{self.mean:.1%} [{self.low:.1%}, {self.high:.1%}]"


@dataclass(frozen=True, slots=True)
class Comparison:
    """The difference of a method from another on the same problems. Positive is better."""

    difference: Estimate
    p_value: float
    num_seeds: int
    """number of seeds in the difference"""
    is_paired_by_seed: bool


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Estimate P(at least one of k <= n samples is correct) without bias: 1 - C(n - c, k) / C(n, k)
    (arXiv 2107.03374, Eq. 1)."""
    assert 1 <= k <= num_samples
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def mean_over_seeds(
    values: Table, keys: Sequence[str], *, limits: Limits = NO_LIMITS, seed: int = 0
) -> Estimate:
    """Estimate the mean of `values[seed][problem]` with an interval (95 %) over seeds and problems,
    or only over problems for one seed.

    Problems with the same key are variants of one another, so keys are resampled, each with all its
    problems: two puzzles of one structure are not two independent observations. Seeds and keys are
    resampled independently of each other: the pigeonhole bootstrap for crossed effects (Owen 2007,
    Ann. Appl. Stat. 1(2), 386-411), which gives too wide intervals for effects specific to one seed
    on one problem. The variance of n resampled seeds is (n - 1) / n of that of n new seeds, so the
    seeds' part is widened by sqrt(n / (n - 1)). With 2 or 3 seeds that differ far more than
    problems do, the interval is still too short. The ends are cut to `limits`, the range that a
    value can have.
    """
    table = _table(values, keys)
    return _interval(table, table[:0], keys, is_paired=True, limits=limits, seed=seed)


def compare(
    method: Mapping[int, Sequence[float]],
    other: Mapping[int, Sequence[float]],
    keys: Sequence[str],
    *,
    limits: Limits = NO_LIMITS,
    seed: int = 0,
) -> Comparison:
    """Compare two methods, each given as seed -> values of the same problems in the same order.

    The comparison uses the seeds that both have. If they share none, it uses all seeds of each,
    unpaired.
    """
    shared = sorted(set(method) & set(other))
    of_method, of_other = ([runs[s] for s in shared or sorted(runs)] for runs in (method, other))
    a = _table(of_method, keys)
    b = _table(of_other, keys)
    difference = _interval(a, b, keys, is_paired=bool(shared), limits=limits, seed=seed)
    p_value = permutation_p_value(of_method, of_other, keys, seed=seed)
    return Comparison(difference, p_value, min(len(of_method), len(of_other)), bool(shared))


def paired_difference(
    method: Table, other: Table, keys: Sequence[str], *, limits: Limits = NO_LIMITS, seed: int = 0
) -> Estimate:
    """Estimate the mean of method - other with its interval (95 %) over seeds and problems, as in
    `mean_over_seeds`.

    Every resample takes the same problems and the same seeds for both methods: row i of both tables
    has the same seed.
    """
    a = _table(method, keys)
    b = _table(other, keys)
    assert len(a) == len(b)
    return _interval(a, b, keys, is_paired=True, limits=limits, seed=seed)


def permutation_p_value(
    method: Table, other: Table, keys: Sequence[str], *, seed: int = 0
) -> float:
    """Compute the two-sided p-value of the paired permutation test: for each key, the two methods
    are swapped or not.

    The statistic is the difference of the means over problems, where each problem's value is the
    mean over its seeds. The test is exact with few keys, otherwise it uses `NUM_PERMUTATIONS` draws
    (`scipy.stats.permutation_test`). It is about *these trained runs*: its null hypothesis is that
    for any key the results could as well be the other method's. Whether other seeds of the same
    methods would differ too is answered by the interval of `paired_difference`.
    """
    means = [_table(values, keys).mean(axis=0) for values in (method, other)]
    a, b = _per_key(np.stack(means), keys)[0]
    if np.allclose(a, b, rtol=0, atol=1e-12):
        return 1.0
    from scipy import stats  # takes most of a second

    differences = _whole_numbers(a - b)
    test = stats.permutation_test(
        (differences, np.zeros_like(differences)),
        lambda x, y, axis: (x - y).sum(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=NUM_PERMUTATIONS,
        rng=np.random.default_rng(seed),
    )
    return float(test.pvalue)


def _whole_numbers(differences: Floats) -> Floats:
    """Scale differences of shares to whole numbers, whose sums are exact. Two permutations with
    equal sums must be exactly equal, not only up to rounding. Other values are not changed."""
    fractions = [Fraction(float(one)).limit_denominator(10_000) for one in differences]
    scale = math.lcm(*(one.denominator for one in fractions))
    scaled = np.array([float(one * scale) for one in fractions])
    is_exact = scale < 2**40 and np.allclose(scaled / scale, differences, rtol=0, atol=1e-12)
    return scaled if is_exact else differences


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values for multiple comparisons: the probability of one false finding among all
    stays below the level.

    Of m sorted ascending, the i-th becomes max over j <= i of min(1, (m - j + 1) p_j) (Holm 1979,
    Scand. J. Stat. 6, 65-70).
    """
    corrected = [0.0] * len(p_values)
    # From the smallest p-value up: the k-th is multiplied by the number of p-values not smaller.
    # The running maximum keeps the order of the p-values.
    largest = 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def _table(values: Table, keys: Sequence[str]) -> Floats:
    table = np.asarray(values, dtype=float)
    assert table.size and table.shape == (len(values), len(keys))
    return table


def _per_key(table: Floats, keys: Sequence[str]) -> tuple[Floats, Floats]:
    """Sum the values over the problems of each key, `[seed, key]`, and count the problems,
    `[key]`."""
    _, cluster = np.unique(keys, return_inverse=True)
    sums = [np.bincount(cluster, weights=row) for row in table]
    return np.array(sums, dtype=np.float64), np.bincount(cluster).astype(np.float64)


def _interval(
    a: Floats, b: Floats, keys: Sequence[str], *, is_paired: bool, limits: Limits, seed: int
) -> Estimate:
    """Estimate mean(a) - mean(b) with its interval; mean(a) if `b` has no rows."""
    rng = np.random.default_rng(seed)
    # A resample draws seeds and keys. Seeds enter as weights `[resample, seed]` and keys as indices
    # `[resample, key]`, so that all resamples together are one matrix product and one lookup. The
    # other method is stacked below with opposite sign: the sum over rows is then the difference,
    # with both methods on the same draw of keys and, if paired, of seeds.
    sums, sizes = _per_key(np.concatenate([a, -b]), keys)
    draws = rng.integers(len(sizes), size=(NUM_RESAMPLES, len(sizes)))
    weights = _seed_weights(len(a), rng)
    others = weights[:, : len(b)] if is_paired else _seed_weights(len(b), rng)
    # For each resample: the sum over its seeds and keys, divided by the number of its problems.
    resampled = np.concatenate([weights, others], axis=1) @ sums
    means = np.take_along_axis(resampled, draws, axis=1).sum(axis=1) / sizes[draws].sum(axis=1)
    low, high = np.quantile(means, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    mean = float(a.mean() - (b.mean() if len(b) else 0.0))
    # The interval must contain the mean: equal values round differently in another order.
    low = min(max(float(low), limits[0]), mean)
    high = max(min(float(high), limits[1]), mean)
    return Estimate(mean, low, high)


def _seed_weights(num_seeds: int, rng: np.random.Generator) -> Floats:
    """Draw weights `[resample, seed]` that sum to 1: the share of each seed in a resample, spread
    more widely for few seeds."""
    if num_seeds == 1:
        return np.ones((NUM_RESAMPLES, 1))
    # Resampled shares vary around 1/n less than new seeds would, so stretch them around it.
    even = 1 / num_seeds
    counts = rng.multinomial(num_seeds, np.full(num_seeds, even), size=NUM_RESAMPLES)
    widening = math.sqrt(num_seeds / (num_seeds - 1))
    return even + widening * (counts / num_seeds - even)


@dataclass(frozen=True, slots=True)
class Ranking:
    """How well scores rank correct completions above wrong ones: the share of pairs of a correct
    and a wrong one in which the correct one has the higher score. Ties count half."""

    pairwise: Estimate | None
    """over the pairs within one problem"""
    auc: Estimate | None
    """over all pairs, also of different problems: the area under the ROC curve"""
    num_problems: int
    """number of problems with a correct and a wrong completion"""
    num_pairs: int
    """number of pairs within one problem"""


def ranking(
    scores: Sequence[Sequence[float]], is_correct: Sequence[Sequence[bool]], *, seed: int = 0
) -> Ranking:
    """Estimate how `scores[problem][completion]` rank completions, with 95 % bootstrap intervals
    over problems.

    Each pair counts once, so a problem with more pairs counts more. None if there is no pair.
    """
    wins, pairs = ranked_pairs(scores, is_correct)
    # How often each problem is drawn, `[resample, problem]`.
    rng = np.random.default_rng(seed)
    size = len(scores)
    drawn = rng.multinomial(size, np.full(size, 1 / size), size=NUM_RESAMPLES).astype(float)

    def within(table: Floats, times: Floats) -> Floats:
        return times @ np.diag(table)

    # Each pair of two problems drawn k and l times occurs k * l times.
    def everywhere(table: Floats, times: Floats) -> Floats:
        return np.einsum("...i,ij,...j->...", times, table, times, optimize=True)

    return Ranking(
        pairwise=_ratio(wins, pairs, within, drawn),
        auc=_ratio(wins, pairs, everywhere, drawn),
        num_problems=int((np.diag(pairs) > 0).sum()),
        num_pairs=int(np.diag(pairs).sum()),
    )


def ranked_pairs(
    scores: Sequence[Sequence[float]], is_correct: Sequence[Sequence[bool]]
) -> tuple[Floats, Floats]:
    """Count the pairs that are ranked correctly (ties half) and all pairs, `[problem of the correct
    one, problem of the wrong one]`."""
    num_problems = len(scores)
    problem = np.repeat(np.arange(num_problems), [len(row) for row in scores])
    score = np.array([value for row in scores for value in row], dtype=np.float64)
    correct = np.array([value for row in is_correct for value in row], dtype=bool)
    # +1, 0 and -1 become 1, one half and 0; then the pairs of two problems are summed.
    share = (np.sign(score[correct][:, None] - score[~correct][None]) + 1) / 2
    of_problem = np.eye(num_problems)
    left, right = of_problem[problem[correct]], of_problem[problem[~correct]]
    return left.T @ share @ right, np.outer(left.sum(axis=0), right.sum(axis=0))


def _ratio(
    wins: Floats, pairs: Floats, total: Callable[[Floats, Floats], Floats], drawn: Floats
) -> Estimate | None:
    """Estimate total(wins) / total(pairs) with its interval; None without a pair."""
    once = np.ones(len(pairs))
    if not total(pairs, once):
        return None
    won, all_pairs = total(wins, drawn), total(pairs, drawn)
    # A resample without any pair is left out.
    ratios = won[all_pairs > 0] / all_pairs[all_pairs > 0]
    low, high = np.quantile(ratios, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    mean = float(total(wins, once) / total(pairs, once))
    return Estimate(mean, min(float(low), mean), max(float(high), mean))
