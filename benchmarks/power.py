"""Predicted power against simulated comparisons: `python benchmarks/power.py`.

Results are drawn from the model of `rlad.runs.power` with the spread of our own comparison, and
each comparison is decided by the interval of a report. A minute or two.
"""

import numpy as np

from rlad.comparison.plan import OUR_SPREAD
from rlad.runs.power import power
from rlad.runs.statistics import paired_difference

NUM_SIMULATIONS = 400
SIZES = ((2, 200), (3, 200), (5, 200), (8, 200), (5, 600))
DIFFERENCES = (0.0, 0.03, 0.06)


def seen(seeds: int, problems: int, difference: float) -> float:
    """Share of the simulated comparisons whose interval leaves 0 out."""
    rng = np.random.default_rng(0)
    keys = [str(i) for i in range(problems)]
    spread = OUR_SPREAD
    num_seen = 0
    for i in range(NUM_SIMULATIONS):
        table = difference + rng.normal(0, spread.seed, (seeds, 1))
        table = table + rng.normal(0, spread.problem, (1, problems))
        table = table + rng.normal(0, spread.both, (seeds, problems))
        table = table + rng.normal(0, spread.completion / 4**0.5, (seeds, problems))
        interval = paired_difference(table, np.zeros_like(table), keys, seed=i)
        num_seen += not interval.low <= 0 <= interval.high
    return num_seen / NUM_SIMULATIONS


def main() -> None:
    print("| seeds | problems | difference | predicted | seen by the interval |")
    print("| --- | --- | --- | --- | --- |")
    for seeds, problems in SIZES:
        for difference in DIFFERENCES:
            predicted = power(difference, OUR_SPREAD, seeds, problems, 4)
            share = seen(seeds, problems, difference)
            print(f"| {seeds} | {problems} | {difference:.2f} | {predicted:.1%} | {share:.1%} |")


if __name__ == "__main__":
    main()
