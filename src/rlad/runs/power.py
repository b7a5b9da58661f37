"""The power of a comparison: the smallest difference that given seeds and problems can detect.

The difference of two methods on one problem with one seed is modelled as

    true difference + a part of the seed + a part of the problem + a part of both + completions

Its mean over S seeds and N problems with K completions each then has the variance

    seed^2 / S + problem^2 / N + (both^2 + completion^2 / K) / (S N)

and the power of the two-sided test at 5 % is that of a t-test (noncentral t) with the degrees of
freedom of Satterthwaite (1946, Biometrics Bulletin 2(6), 110-114).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

POWER = 0.8
_LEVEL = 0.05
_MOST = 100_000
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Spread:
    """The standard deviations of the parts of a difference, as shares (.05 is 5 points)."""

    seed: float
    problem: float
    both: float
    completion: float
    """for a single completion of each method"""

    def parts(self, seeds: int, problems: int, completions: int) -> list[tuple[float, float]]:
        """Return variance and degrees of freedom of each part of the mean."""
        rest = self.both**2 + self.completion**2 / completions
        return [
            (self.seed**2 / seeds, seeds - 1),
            (self.problem**2 / problems, problems - 1),
            (rest / (seeds * problems), max((seeds - 1) * (problems - 1), problems - 1)),
        ]


def spread_of(differences: Floats, completion_variance: float, num_samples: int) -> Spread:
    """Estimate the parts from `differences[seed, problem]` of a pilot, of at least two seeds and
    problems, by a two-way analysis of variance.

    `completion_variance` is the variance of a single completion, summed over both methods and
    averaged over the cells; `num_samples` is the number of completions in each cell. With one,
    everything that seeds and problems do not explain counts as completions.
    """
    num_seeds, num_problems = differences.shape
    mean = differences.mean()
    of_seed = differences.mean(axis=1)
    of_problem = differences.mean(axis=0)
    residuals = differences - of_seed[:, None] - of_problem + mean
    unexplained = (residuals**2).sum() / ((num_seeds - 1) * (num_problems - 1))
    seed = of_seed.var(ddof=1) - unexplained / num_problems
    problem = of_problem.var(ddof=1) - unexplained / num_seeds
    if num_samples == 1:
        completion_variance = unexplained
    both = unexplained - completion_variance / num_samples
    parts = (seed, problem, both, completion_variance)
    return Spread(*(math.sqrt(max(float(part), 0.0)) for part in parts))


def power(
    difference: float, spread: Spread, seeds: int, problems: int, completions: int = 1
) -> float:
    """Return the probability that a comparison, with at least two seeds and problems, detects a
    true difference.

    With few seeds the test of this mean can get worse with more problems, since its variance is
    then known only from the seeds. A test on a part of the problems is valid too, so the power of
    the best one counts, and more problems never reduce it.
    """
    sizes = {round(2 ** (i / 2)) for i in range(2, 40)}
    numbers = {problems, *(size for size in sizes if size < problems)}
    return max(_power(difference, spread, seeds, number, completions) for number in numbers)


def _power(difference: float, spread: Spread, seeds: int, problems: int, completions: int) -> float:
    from scipy import stats  # takes most of a second

    parts = spread.parts(seeds, problems, completions)
    variance = sum(part for part, _ in parts)
    if variance == 0:
        return 1.0 if difference else _LEVEL
    freedom = variance**2 / sum(part**2 / degrees for part, degrees in parts)
    distance = abs(difference) / math.sqrt(variance)
    limit = stats.t.ppf(1 - _LEVEL / 2, freedom)
    beyond = stats.nct.sf(limit, freedom, distance) + stats.nct.cdf(-limit, freedom, distance)
    # Far out scipy's noncentral t is NaN; the normal distribution is as accurate there.
    return float(beyond if math.isfinite(beyond) else stats.norm.sf(limit - distance))


def smallest_difference(spread: Spread, seeds: int, problems: int, completions: int = 1) -> float:
    """Return the true difference that is detected with a power of 80 %."""
    low, high = 0.0, 1e-6
    while power(high, spread, seeds, problems, completions) < POWER:
        low, high = high, 2 * high
    while high - low > 1e-5:
        middle = (low + high) / 2
        if power(middle, spread, seeds, problems, completions) < POWER:
            low = middle
        else:
            high = middle
    return high


def seeds_needed(
    difference: float, spread: Spread, problems: int, completions: int = 1
) -> int | None:
    """Return the fewest seeds that detect a difference with a power of 80 %. None if no number
    does, because the problems alone vary too much."""
    return _fewest(lambda n: power(difference, spread, n, problems, completions))


def problems_needed(
    difference: float, spread: Spread, seeds: int, completions: int = 1
) -> int | None:
    """Return the fewest test problems that detect it. None if no number does, because the seeds
    alone vary too much."""
    return _fewest(lambda n: power(difference, spread, seeds, n, completions))


def _fewest(power_of: Callable[[int], float]) -> int | None:
    low, high = 1, 2
    while power_of(high) < POWER:
        low, high = high, 2 * high
        if high > _MOST:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if power_of(middle) < POWER else (low, middle)
    return high


def pilot_spread(
    method: Sequence[Sequence[int]], other: Sequence[Sequence[int]], num_samples: int
) -> Spread:
    """Estimate the spread from a pilot: the number of correct completions among `num_samples`,
    `[seed][problem]`, for two methods on the same seeds and problems."""
    counts = [np.asarray(table, dtype=float) for table in (method, other)]
    completion = 0.0
    if num_samples > 1:
        # The unbiased variance of one completion, from the spread of the samples in a cell.
        for table in counts:
            shares = table * (num_samples - table) / (num_samples * (num_samples - 1))
            completion += float(shares.mean())
    return spread_of((counts[0] - counts[1]) / num_samples, completion, num_samples)
