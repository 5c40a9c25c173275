"""Intervals and paired differences against tabulated t values, SciPy, and known means."""

import numpy as np
import pytest
from scipy import stats

from advmoe_jax.evaluation.statistics import Estimate, estimate, paired_difference

# Quantiles of Student's t at 0.975, by degrees of freedom, as printed in tables.
TABLE = {1: 12.706, 2: 4.303, 4: 2.776, 9: 2.262}


@pytest.mark.parametrize("degrees", TABLE)
def test_the_factor_is_the_tabulated_one(degrees):
    values = np.arange(degrees + 1.0)
    found = estimate(list(values))
    standard_error = np.std(values, ddof=1) / np.sqrt(len(values))
    assert found.mean == values.mean() and found.count == len(values)
    assert found.half_width / standard_error == pytest.approx(TABLE[degrees], abs=5e-4)


@pytest.mark.parametrize("level", [0.5, 0.95, 0.99])
def test_accuracies_against_scipy(level):
    accuracies = np.random.default_rng(1).normal(0.52, 0.01, size=5)
    low, high = stats.t.interval(
        level, len(accuracies) - 1, accuracies.mean(), stats.sem(accuracies)
    )
    mean, half_width, _ = estimate(list(accuracies), level)
    np.testing.assert_allclose([mean - half_width, mean + half_width], [low, high], rtol=1e-12)


def test_intervals_cover_the_known_mean_as_often_as_they_say():
    rng = np.random.default_rng(2)
    draws = rng.normal(0.5, 0.02, size=(2000, 3))
    found = [estimate(list(row)) for row in draws]
    covered = np.mean([abs(e.mean - 0.5) <= e.half_width for e in found])
    assert covered == pytest.approx(0.95, abs=0.015)  # three standard errors of 2,000 draws


def test_differences_are_paired_by_seed():
    rng = np.random.default_rng(3)
    seeds = rng.permutation(6)
    shared = rng.normal(0.5, 0.1, size=6)  # what a seed does to every method
    dense = dict(zip(seeds.tolist(), shared, strict=True))
    gains = dict(zip(seeds.tolist(), rng.normal(0.02, 0.001, size=6), strict=True))
    # In another order, and with a seed that the dense network lacks.
    advmoe = {seed: dense[seed] + gains[seed] for seed in sorted(dense)} | {99: 0.9}
    found = paired_difference(advmoe, dense)
    low, high = stats.ttest_rel(
        [advmoe[seed] for seed in dense], list(dense.values())
    ).confidence_interval(0.95)
    np.testing.assert_allclose(found.mean - found.half_width, low, rtol=1e-9)
    np.testing.assert_allclose(found.mean + found.half_width, high, rtol=1e-9)
    assert found.count == 6
    # Unpaired, the seeds' spread would drown the difference.
    assert found.half_width < 0.01 < estimate(list(advmoe.values())).half_width


def test_one_seed_has_no_interval_and_none_no_mean():
    assert estimate([0.5]) == Estimate(0.5, None, 1)
    assert paired_difference({0: 0.75}, {0: 0.5, 1: 0.25}) == Estimate(0.25, None, 1)
    assert estimate([]) is None
    assert paired_difference({0: 0.5}, {1: 0.5}) is None


def test_equal_values_have_an_interval_of_no_width():
    assert estimate([0.25, 0.25, 0.25]) == Estimate(0.25, 0.0, 3)
