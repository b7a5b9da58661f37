"""What a comparison can see: against published sample sizes, by hand, and against simulation."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from rlad.comparison.plan import OUR_SPREAD, Plan, read_pilot
from rlad.errors import UserError
from rlad.runs.power import (
    Spread,
    pilot_spread,
    power,
    problems_needed,
    seeds_needed,
    smallest_difference,
    spread_of,
)
from rlad.runs.statistics import paired_difference

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "methods.jsonl"


# Sample sizes of the one-sample t-test, two-sided 5 %, power 80 %, as G*Power and statsmodels'
# TTestPower give them.
@pytest.mark.parametrize(("effect", "size"), [(0.5, 34), (0.8, 15), (1.0, 10), (0.2, 199)])
def test_where_seeds_alone_vary_it_is_the_t_test(effect, size):
    spread = Spread(seed=1, problem=0, both=0, completion=0)
    assert seeds_needed(effect, spread, problems=100) == size
    assert problems_needed(effect, spread, seeds=size - 1) is None


@pytest.mark.parametrize(("effect", "size"), [(0.5, 34), (0.8, 15)])
def test_where_problems_alone_vary_it_is_the_t_test_over_problems(effect, size):
    spread = Spread(seed=0, problem=1, both=0, completion=0)
    assert problems_needed(effect, spread, seeds=3) == size
    assert seeds_needed(effect, spread, problems=size - 1) is None


def test_completions_count_as_many_times_as_there_are_of_them():
    spread = Spread(seed=0.01, problem=0, both=0, completion=0.6)
    assert power(0.05, spread, 5, 100, 4) > power(0.05, spread, 5, 100, 1)
    # A fourth of the variance: as with four times the problems, but for degrees of freedom.
    few, many = power(0.05, spread, 5, 400, 1), power(0.05, spread, 5, 100, 4)
    assert few == pytest.approx(many, abs=0.01)


def test_the_smallest_difference_has_a_power_of_80_percent_and_falls_with_the_size():
    for seeds in (2, 3, 5, 20):
        found = [smallest_difference(OUR_SPREAD, seeds, n) for n in (10, 100, 1000, 10_000)]
        assert all(more < less + 2e-4 for less, more in pairwise(found))  # hundredths of a point
        for n, one in zip((10, 100, 1000, 10_000), found, strict=True):
            assert power(one, OUR_SPREAD, seeds, n) == pytest.approx(0.8, abs=0.002)
    by_seeds = [smallest_difference(OUR_SPREAD, seeds, 300) for seeds in (2, 3, 5, 20)]
    assert by_seeds == sorted(by_seeds, reverse=True)


def test_no_difference_is_seen_in_5_percent():
    spread = Spread(seed=1, problem=0, both=0, completion=0)
    assert power(0.0, spread, 5, 100) == pytest.approx(0.05, abs=1e-6)
    assert power(0.1, Spread(0, 0, 0, 0), 5, 100) == 1


def test_the_spread_of_a_table_by_hand():
    # Seeds differ by 2 in all problems, nothing else does: their variance is 2.
    assert spread_of(np.array([[1.0, 1.0], [3.0, 3.0]]), 0.0, 2) == Spread(2**0.5, 0, 0, 0)
    # Problems alone.
    assert spread_of(np.array([[1.0, 3.0], [1.0, 3.0]]), 0.0, 2) == Spread(0, 2**0.5, 0, 0)
    # Neither has an effect: what is left is 4 / ((2 - 1) (2 - 1)).
    assert spread_of(np.array([[1.0, -1.0], [-1.0, 1.0]]), 0.0, 2) == Spread(0, 0, 2, 0)
    # With one completion that is the completions'.
    assert spread_of(np.array([[1.0, -1.0], [-1.0, 1.0]]), 0.0, 1) == Spread(0, 0, 0, 2)


def test_the_spread_of_simulated_results_is_what_they_were_made_with():
    rng = np.random.default_rng(0)
    seeds, problems, samples = 60, 400, 4
    chances = []
    for shift in (0.05, 0.0):
        seed_part = rng.normal(0, 0.04, (seeds, 1)) / 2**0.5
        problem_part = rng.normal(0, 0.10, (1, problems)) / 2**0.5
        chances.append(np.clip(0.5 + shift + seed_part + problem_part, 0, 1))
    counts = [rng.binomial(samples, chance) for chance in chances]
    found = pilot_spread(counts[0].tolist(), counts[1].tolist(), samples)
    assert found.seed == pytest.approx(0.04, rel=0.2)
    assert found.problem == pytest.approx(0.10, rel=0.2)
    assert found.completion == pytest.approx(0.5**0.5, rel=0.05)  # two of variance 1/4


def test_predicted_power_is_near_what_intervals_see():
    """Decided by the interval of a report; benchmarks/power.py has the table."""
    rng = np.random.default_rng(0)
    keys = [str(i) for i in range(200)]
    predicted = power(0.06, OUR_SPREAD, 5, 200, 4)
    num_seen = 0
    for i in range(200):
        table = 0.06 + rng.normal(0, OUR_SPREAD.seed, (5, 1))
        table = table + rng.normal(0, OUR_SPREAD.problem, (1, 200))
        table = table + rng.normal(0, OUR_SPREAD.completion / 2, (5, 200))
        interval = paired_difference(table, np.zeros_like(table), keys, seed=i)
        num_seen += interval.low > 0
    assert num_seen / 200 == pytest.approx(predicted, abs=0.1)


def test_our_spread_is_that_of_the_published_comparison():
    found = []
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    tables: dict = {}
    for row in rows:
        tables.setdefault(row["method"], []).append(row["test_after"]["num_correct"])
    for method, table in tables.items():
        if method != "grpo":
            found.append(pilot_spread(table, tables["grpo"], 4))
    for part in ("seed", "problem", "both", "completion"):
        mean = np.mean([getattr(one, part) ** 2 for one in found]) ** 0.5
        assert getattr(OUR_SPREAD, part) == pytest.approx(mean, abs=5e-4)


def test_a_pilot_is_read_from_a_file_and_what_is_none_is_refused(tmp_path):
    found = read_pilot(RESULTS)
    assert found is not None and "opd and grpo, 5 seeds" in found[1]  # the pair that spreads most
    plan = Plan(found[1], found[0], seeds=5, problems=200, completions=4, wanted=0.05)
    assert plan.sees == pytest.approx(0.092, abs=0.002) and plan.seeds_needed == 16
    assert Plan("", found[0], 1, 200, 4, 0.05).sees is None
    (tmp_path / "results.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"is not a results\.jsonl"):
        read_pilot(tmp_path / "results.jsonl")
    assert read_pilot(tmp_path / "nothing") is None
