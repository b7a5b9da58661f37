"""pass@k by hand and by enumeration; intervals by hand and by simulation; comparisons by hand and
by exact enumeration."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from rlad.runs.statistics import (
    Estimate,
    Ranking,
    compare,
    holm,
    mean_over_seeds,
    paired_difference,
    pass_at_k,
    permutation_p_value,
    ranking,
)

# --- pass@k ---------------------------------------------------------------------------------------


def test_pass_at_k_by_hand():
    # 4 samples, 1 correct: of the 6 pairs 3 hold the correct one; of the 4 triples 3.
    assert pass_at_k(4, 1, 1) == 0.25
    assert pass_at_k(4, 1, 2) == 0.5
    assert pass_at_k(4, 1, 3) == 0.75
    assert pass_at_k(4, 1, 4) == 1
    assert pass_at_k(10, 0, 10) == 0
    assert pass_at_k(10, 3, 8) == 1


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_equals_the_share_of_subsets_with_a_correct_sample(n: int):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-15)


def test_pass_at_k_of_many_samples_does_not_overflow():
    assert pass_at_k(2000, 1, 1000) == pytest.approx(0.5, abs=1e-12)


# --- intervals ------------------------------------------------------------------------------------


def test_the_interval_holds_the_truth_in_about_95_of_100_cases():
    rng = np.random.default_rng(0)
    keys = [str(i) for i in range(100)]
    intervals = [
        mean_over_seeds([(rng.random(100) < 0.3).astype(float)], keys, seed=i) for i in range(300)
    ]
    covered = sum(interval.low <= 0.3 <= interval.high for interval in intervals)
    # Standard deviation of 300 draws with probability .95: 3.8; the percentile interval is slightly
    # too short.
    assert 270 <= covered <= 297


def test_variants_of_one_problem_are_not_independent():
    """20 problems of 5 variants each with equal results: the interval is that of 20 observations,
    not of 100."""
    rng = np.random.default_rng(1)
    passed = (rng.random(20) < 0.5).astype(float)
    clustered = mean_over_seeds([np.repeat(passed, 5)], [str(i // 5) for i in range(100)])
    alone = mean_over_seeds([passed], [str(i) for i in range(20)])
    naive = mean_over_seeds([np.repeat(passed, 5)], [str(i) for i in range(100)])
    assert clustered.mean == pytest.approx(alone.mean) and (
        clustered.low,
        clustered.high,
    ) == pytest.approx((alone.low, alone.high))
    assert (clustered.high - clustered.low) / (naive.high - naive.low) == pytest.approx(
        math.sqrt(5), rel=0.15
    )


def test_the_interval_is_the_same_in_every_process_and_holds_the_mean():
    values = [0.0, 1.0, 0.5, 0.25]
    keys = list("abcd")
    assert mean_over_seeds([values], keys) == mean_over_seeds([values], keys)
    for values in ([1 / 3] * 7, [0.1] * 3, [1.0], [0.0, 0.0]):
        estimate = mean_over_seeds([values], [str(i) for i in range(len(values))])
        assert estimate.low <= estimate.mean <= estimate.high
        assert estimate.high - estimate.low < 1e-12


def test_an_estimate_reads_as_per_cent():
    assert str(Estimate(0.5, 0.123, 0.9)) == "50.0% [12.3%, 90.0%]"


# --- over seeds -----------------------------------------------------------------------------------


def test_two_seeds_by_hand():
    """All problems equal, so only seeds are resampled: 0 and 1 with probability 1/4 each, .5 with
    1/2; deviations from .5 are widened by sqrt(2). The 2.5 % quantile is the lowest of them."""
    estimate = mean_over_seeds([[0.0] * 3, [1.0] * 3], list("abc"))
    assert (estimate.mean, estimate.low, estimate.high) == pytest.approx(
        (0.5, 0.5 - math.sqrt(0.5), 0.5 + math.sqrt(0.5))
    )
    limited = mean_over_seeds([[0.0] * 3, [1.0] * 3], list("abc"), limits=(0, 1))
    assert (limited.low, limited.high) == (0, 1)


def crossed(rng: np.random.Generator, num_seeds: int, sd: float) -> tuple[np.ndarray, np.ndarray]:
    """Samples of two methods on 200 problems: the first is .05 better in the mean; each seed of
    each differs with `sd`."""
    problems = 0.2 + 0.6 * rng.random(200)
    chances = [problems + rng.normal(0, sd, (num_seeds, 1)) + shift for shift in (0.025, -0.025)]
    first, second = (rng.random((num_seeds, 200)) < chance for chance in chances)
    return first.astype(float), second.astype(float)


@pytest.mark.parametrize(
    ("num_seeds", "sd", "widest"), [(1, 0.0, 1.1), (3, 0.0, 2.0), (3, 0.03, 1.7), (5, 0.03, 1.7)]
)
def test_intervals_over_seeds_and_problems_hold_the_truth_and_are_not_too_wide(
    num_seeds, sd, widest
):
    """Of 200 simulated comparisons they hold it in at least 92 % and, as the bootstrap errs on the
    wide side, up to all.

    How wide they may be, in widths that the spread of the 200 estimates asks for: with one seed as
    wide as that. What is peculiar to one seed on one problem is counted three times (Owen 2007),
    once with the seeds' widening: where there is nothing else, with 3 seeds of sd 0, that is sqrt(1
    + 1.5 + 1) = 1.9 times; less where the seeds differ as such.
    """
    rng = np.random.default_rng(2)
    keys = [str(i) for i in range(200)]
    pairs = [crossed(rng, num_seeds, sd) for _ in range(200)]
    means = [mean_over_seeds(first, keys, seed=i) for i, (first, _) in enumerate(pairs)]
    differences = [
        paired_difference(first, second, keys, seed=i) for i, (first, second) in enumerate(pairs)
    ]
    for estimates, truth in ((means, 0.525), (differences, 0.05)):
        assert sum(e.low <= truth <= e.high for e in estimates) >= 184
        needed = 2 * 1.96 * np.std([e.mean for e in estimates])
        assert np.mean([e.high - e.low for e in estimates]) < widest * needed


@pytest.mark.parametrize(("num_seeds", "widest"), [(2, 1.6), (3, 1.2), (5, 1.0)])
def test_seeds_that_do_not_differ_widen_the_interval_little(num_seeds, widest):
    """sd 0: against one seed the noise of single samples falls with the number of seeds and is
    counted about three times."""
    rng = np.random.default_rng(5)
    keys = [str(i) for i in range(200)]
    widths: list[float] = []
    for number in (num_seeds, 1):
        pairs = [crossed(rng, number, 0.0) for _ in range(50)]
        intervals = [paired_difference(*pair, keys, seed=i) for i, pair in enumerate(pairs)]
        widths.append(float(np.mean([interval.high - interval.low for interval in intervals])))
    assert widths[0] < widest * widths[1]


def test_pairing_takes_what_problems_and_seeds_share_out_of_the_difference():
    rng = np.random.default_rng(3)
    keys = [str(i) for i in range(100)]
    first = rng.random((3, 100)) + rng.normal(0, 0.3, (3, 1))
    paired = paired_difference(first + 0.1, first, keys)
    assert (paired.mean, paired.low, paired.high) == pytest.approx((0.1, 0.1, 0.1))
    others = compare(dict(enumerate(first + 0.1)), dict(enumerate(first, start=9)), keys)
    unpaired = others.difference
    assert unpaired.mean == pytest.approx(0.1) and unpaired.low < 0 < 0.2 < unpaired.high


def test_comparisons_are_over_the_seeds_that_both_have():
    keys = list("abcd")
    method = {0: [1.0, 1, 1, 0], 1: [1.0, 1, 0, 0], 2: [0.0] * 4}
    other = {1: [0.0, 1, 0, 0], 0: [0.0, 0, 1, 0], 7: [1.0] * 4}
    compared = compare(method, other, keys)
    assert compared.difference.mean == pytest.approx((0.75 + 0.5) / 2 - (0.25 + 0.25) / 2)
    assert (compared.num_seeds, compared.is_paired_by_seed) == (2, True)
    strangers = compare({0: [1.0, 0, 1, 0], 1: [1.0] * 4}, {5: [0.0, 0, 0, 1]}, keys)
    assert strangers.difference.mean == pytest.approx(0.75 - 0.25)
    assert (strangers.num_seeds, strangers.is_paired_by_seed) == (1, False)


# --- p-values -------------------------------------------------------------------------------------


def exact_p(differences: list[float]) -> float:
    """Twice the smaller tail over all ways to exchange the methods on each key."""
    observed = sum(differences)
    sums = [
        sum(s * d for s, d in zip(signs, differences, strict=True))
        for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    tails = [sum(x >= observed - 1e-12 for x in sums), sum(x <= observed + 1e-12 for x in sums)]
    return min(1.0, 2 * min(tails) / len(sums))


@pytest.mark.parametrize("seed", range(5))
def test_permutation_test_equals_enumeration(seed):
    """Two seeds, 8 problems of 6 keys."""
    rng = np.random.default_rng(seed)
    keys = list("aabbcdef")
    a, b = rng.integers(0, 5, (2, 2, 8)) / 4
    difference = a.mean(axis=0) - b.mean(axis=0)
    by_key = [float(difference[[k == key for k in keys]].sum()) for key in "abcdef"]
    assert permutation_p_value(a, b, keys) == pytest.approx(exact_p(by_key))


def test_permutation_test_by_hand():
    # Better by the same on each of 4 problems: only 1 of 16 exchanges gives as much, twice that for
    # both sides.
    assert permutation_p_value([[1.0] * 4], [[0.0] * 4], list("abcd")) == 2 / 16
    assert permutation_p_value([[1.0, 0.5]], [[1.0, 0.5]], list("ab")) == 1.0


@pytest.mark.parametrize("seed", range(40))
def test_permutations_that_tie_count_as_equal(seed):
    """Thirds and sevenths, whose sums as floats depend on their order."""
    rng = np.random.default_rng(seed)
    num_seeds = int(rng.choice([3, 5, 6, 7]))
    keys = [str(i) for i in range(int(rng.integers(5, 10)))]
    a, b = (rng.random((2, num_seeds, len(keys))) < 0.5).astype(float)
    whole = [float(one) for one in (a - b).sum(axis=0)]
    expected = exact_p(whole) if any(whole) else 1.0
    assert permutation_p_value(a, b, keys) == pytest.approx(expected, abs=1e-12)


def test_p_values_of_equal_methods_are_spread_evenly():
    rng = np.random.default_rng(4)
    keys = [str(i) for i in range(40)]
    p_values = [
        permutation_p_value(rng.random((1, 40)), rng.random((1, 40)), keys, seed=i)
        for i in range(100)
    ]
    # Standard deviation of 100 draws with probability .1 and .5: 3 and 5.
    assert 1 <= sum(p < 0.1 for p in p_values) <= 19 and 35 <= sum(p < 0.5 for p in p_values) <= 65


def test_holm_by_hand():
    # Sorted .01, .03, .04 times 3, 2, 1: .03, .06, .04, and none smaller than the one before.
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


# --- ranking --------------------------------------------------------------------------------------

SCORES = [[-1.0, -2.0, -3.0], [-0.5, -0.5], [-4.0, -5.0]]
IS_CORRECT = [[True, False, True], [True, False], [False, False]]


def test_a_ranking_by_hand():
    """Within the first problem -1 beats -2 and -3 does not; in the second the two are equal; the
    third has no correct one: 1.5 of 3. Over all, the correct ones -1, -3, -.5 against -2, -.5, -4,
    -5: 3 + 2 + 3.5 of 12."""
    found = ranking(SCORES, IS_CORRECT)
    assert found.pairwise is not None and found.pairwise.mean == 0.5
    assert found.auc is not None and found.auc.mean == pytest.approx(8.5 / 12, abs=1e-15)
    assert (found.num_problems, found.num_pairs) == (2, 3)


def test_a_ranking_without_pairs():
    found = ranking([[-1.0], [-2.0]], [[True], [True]])
    assert found == Ranking(None, None, 0, 0)
    across = ranking([[-1.0], [-2.0]], [[True], [False]])
    assert across.pairwise is None and across.auc is not None and across.auc.mean == 1


def random_ranking(seed, num_problems=12):
    """Some problems have correct completions alone, or wrong ones; scores are rounded, so that
    some tie."""
    rng = np.random.default_rng(seed)
    is_correct = [list(rng.random(rng.integers(1, 7)) < rng.random()) for _ in range(num_problems)]
    scores = [[round(c + rng.normal(), 1) for c in row] for row in is_correct]
    return scores, is_correct


def joined(rows):
    return list(itertools.chain.from_iterable(rows))


def auc_of(scores, is_correct):
    """The area under the ROC curve by the Mann-Whitney U statistic."""
    is_correct = np.array(is_correct, dtype=bool)
    right, wrong = np.array(scores)[is_correct], np.array(scores)[~is_correct]
    return stats.mannwhitneyu(right, wrong).statistic / (len(right) * len(wrong))


@pytest.mark.parametrize("seed", range(5))
def test_a_ranking_against_scipy(seed):
    scores, is_correct = random_ranking(seed)
    found = ranking(scores, is_correct)
    whole = auc_of(joined(scores), joined(is_correct))
    mixed = [i for i, row in enumerate(is_correct) if 0 < sum(row) < len(row)]
    pairs = [sum(is_correct[i]) * (len(is_correct[i]) - sum(is_correct[i])) for i in mixed]
    within = np.average([auc_of(scores[i], is_correct[i]) for i in mixed], weights=pairs)
    assert found.auc.mean == pytest.approx(whole, abs=1e-12)
    assert found.pairwise.mean == pytest.approx(within, abs=1e-12)
    assert (found.num_problems, found.num_pairs) == (len(mixed), sum(pairs))


def test_the_interval_of_a_ranking_is_that_of_drawing_problems():
    """Against a bootstrap that puts the drawn problems together and computes anew."""
    scores, is_correct = random_ranking(3, num_problems=20)
    found = ranking(scores, is_correct)
    rng = np.random.default_rng(1)
    drawn = []
    for _ in range(1500):
        chosen = rng.integers(20, size=20)
        drawn.append(
            auc_of(joined(scores[i] for i in chosen), joined(is_correct[i] for i in chosen))
        )
    low, high = np.quantile(drawn, (0.025, 0.975))
    assert found.auc.low == pytest.approx(low, abs=0.02)
    assert found.auc.high == pytest.approx(high, abs=0.02)


def test_a_ranking_does_not_depend_on_order_or_scale():
    scores, is_correct = random_ranking(4)
    found = ranking(scores, is_correct)
    scaled = ranking([[3 * s - 7 for s in row] for row in scores], is_correct)
    turned = ranking([[-s for s in row] for row in scores], is_correct)
    assert scaled == found
    assert turned.auc.mean == pytest.approx(1 - found.auc.mean, abs=1e-12)
    assert turned.pairwise.mean == pytest.approx(1 - found.pairwise.mean, abs=1e-12)
    other = ranking([row[::-1] for row in scores], [row[::-1] for row in is_correct])
    assert other == found
