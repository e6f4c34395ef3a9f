"""Intervals and the test of what changed, against numbers from the literature and plain sums of fractions."""

import math
from fractions import Fraction

import numpy as np
import pytest

from minicache.reports.intervals import MOST_RESAMPLED, interval_of_mean, mcnemar, wilson


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    # Newcombe 1998, Two-sided confidence intervals for the single proportion, table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilsons_interval_is_that_of_the_literature(successes: int, n: int, low: float, high: float) -> None:
    assert wilson(successes, n, z=1.959964) == pytest.approx((low, high), abs=6e-5)
    assert wilson(n - successes, n, z=1.959964) == pytest.approx((1 - high, 1 - low), abs=6e-5)


@pytest.mark.parametrize("n", [1, 7, 100, 5000])
def test_wilson_is_where_the_score_test_turns(n: int) -> None:
    """By its definition: the bounds p solve (share - p)² = z² p (1 - p) / n."""
    for successes in {0, 1, n / 2, n - 0.5, n}:
        share, z2 = successes / n, 1.96**2 / n
        roots = np.clip(np.sort(np.roots([1 + z2, -2 * share - z2, share**2]).real), 0, 1)
        assert wilson(successes, n) == pytest.approx(tuple(roots), abs=1e-7)


def test_nothing_counted_says_nothing() -> None:
    assert wilson(0, 0) == (0.0, 1.0) and mcnemar(0, 0) == 1.0


@pytest.mark.parametrize(("gained", "lost"), [(1, 0), (5, 5), (9, 2), (0, 12), (40, 21), (300, 260)])
def test_mcnemar_is_the_exact_binomial_test(gained: int, lost: int) -> None:
    n = gained + lost
    tail = sum(Fraction(math.comb(n, k), 2**n) for k in range(min(gained, lost) + 1))
    assert mcnemar(gained, lost) == pytest.approx(float(min(Fraction(1), 2 * tail)), rel=1e-9)
    assert mcnemar(gained, lost) == mcnemar(lost, gained)


def test_mcnemar_of_many_pairs_is_a_number() -> None:
    assert mcnemar(60_000, 60_000) == pytest.approx(1.0)
    assert 0 <= mcnemar(70_000, 50_000) < 1e-100


def test_the_interval_of_a_mean_covers_it_as_often_as_it_says() -> None:
    """Of a skewed distribution with mean 1, drawn anew 400 times."""
    random = np.random.default_rng(1)
    covered = 0
    for seed in range(400):
        low, high = interval_of_mean(random.exponential(size=60), seed)
        covered += low <= 1 <= high
    assert 0.89 < covered / 400 < 0.98


def test_many_values_have_the_interval_that_the_bootstrap_approaches() -> None:
    values = np.random.default_rng(2).normal(0.3, 2.0, MOST_RESAMPLED + 1)
    many, fewer = interval_of_mean(values), interval_of_mean(values[:-1])
    assert many == pytest.approx(fewer, abs=2e-3) and many[0] < 0.3 < many[1]


def test_the_same_values_have_the_same_interval() -> None:
    values = np.arange(50.0)
    assert interval_of_mean(values) == interval_of_mean(values.copy())
    assert interval_of_mean(values[:1]) == (0.0, 0.0)
