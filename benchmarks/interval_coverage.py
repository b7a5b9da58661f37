"""How often the interval of a difference holds the truth, in simulated comparisons: `python
benchmarks/interval_coverage.py`.

Two methods on 400 problems with chances of success between .2 and .8; the first is 5 points better
in the mean, and each seed of each method deviates by a normal amount with the standard deviation of
the column. Nominal: 95 %.
"""

import numpy as np

from rlad.runs.statistics import paired_difference

NUM_PROBLEMS = 400
NUM_SIMULATIONS = 500
DEVIATIONS = (0.0, 0.02, 0.05, 0.1, 0.2)
TRUTH = 0.05


def coverage(num_seeds: int, deviation: float) -> float:
    """Share of the simulated comparisons whose interval holds the true difference."""
    rng = np.random.default_rng(0)
    keys = [str(i) for i in range(NUM_PROBLEMS)]
    num_held = 0
    for i in range(NUM_SIMULATIONS):
        problems = 0.2 + 0.6 * rng.random(NUM_PROBLEMS)
        shifts = (TRUTH / 2, -TRUTH / 2)
        chances = [problems + rng.normal(0, deviation, (num_seeds, 1)) + shift for shift in shifts]
        first, second = ((rng.random(chance.shape) < chance).astype(float) for chance in chances)
        interval = paired_difference(first, second, keys, limits=(-1, 1), seed=i)
        num_held += interval.low <= TRUTH <= interval.high
    return num_held / NUM_SIMULATIONS


def main() -> None:
    print(
        f"| seeds | {' | '.join(f'sd {deviation:g}' for deviation in DEVIATIONS)} "
        f"|\n|{' --- |' * (1 + len(DEVIATIONS))}"
    )
    for num_seeds in (2, 3, 5):
        print(
            f"| {num_seeds} | "
            f"{' | '.join(f'{coverage(num_seeds, deviation):.1%}' for deviation in DEVIATIONS)} |"
        )


if __name__ == "__main__":
    main()
