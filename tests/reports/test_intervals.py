"""Intervals of shares."""

import numpy as np
import pytest

from minicache.reports.intervals import wilson


@pytest.mark.parametrize("n", [1, 7, 100, 5000])
def test_wilson_is_where_the_score_test_turns(n: int) -> None:
    """By its definition: the bounds p solve (share - p)² = z² p (1 - p) / n."""
    for successes in {0, 1, n / 2, n - 0.5, n}:
        share, z2 = successes / n, 1.96**2 / n
        roots = np.clip(np.sort(np.roots([1 + z2, -2 * share - z2, share**2]).real), 0, 1)
        assert wilson(successes, n) == pytest.approx(tuple(roots), abs=1e-7)


def test_wilson_holds_known_values_and_knows_nothing_of_no_trial() -> None:
    assert wilson(8, 10, z=1.959964) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(0, 20)[0] == 0.0 and wilson(20, 20)[1] == 1.0
    low, high = wilson(5, 10, z=2.5758)
    assert low < wilson(5, 10)[0] and high > wilson(5, 10)[1]
