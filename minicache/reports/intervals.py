"""Intervals of what was counted and measured, and a test of what changed. No torch."""

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

RESAMPLES, MOST_RESAMPLED = 1000, 20_000


def wilson(successes: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """The interval of a share of `n` trials (Wilson 1927), 95% at the default z; (0, 1) where there are none.

    successes: may hold halves, of ties. Half a success varies less than a whole one, so the interval is then on the safe side.
    """
    if not n:
        return 0.0, 1.0
    share, spread = successes / n, 1 + z * z / n
    middle = (share + z * z / (2 * n)) / spread
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / spread
    return max(0.0, middle - half), min(1.0, middle + half)


def mcnemar(gained: int, lost: int) -> float:
    """The two-sided p value of the exact test of McNemar, 1947: how likely pairs that changed would split at least so unevenly if
    gains and losses were equally likely. 1 where none changed."""
    changed, fewer = gained + lost, min(gained, lost)
    if not changed:
        return 1.0
    # logarithms, because the numbers of ways outgrow a float
    half = -changed * math.log(2)
    ways = (math.lgamma(changed + 1) - math.lgamma(k + 1) - math.lgamma(changed - k + 1) for k in range(fewer + 1))
    return min(1.0, 2 * math.fsum(math.exp(each + half) for each in ways))


def interval_of_mean(values: "NDArray[np.float64]", seed: int = 0) -> tuple[float, float]:
    """The 95% interval of a mean by the percentile bootstrap (Efron 1979); of many values by the normal distribution, which it
    approaches. values: (n,). Of values that are not all finite: not a number, twice."""
    # not for the commands that print intervals
    import numpy as np

    if not np.isfinite(values).all():
        return math.nan, math.nan
    if len(values) < 2:
        return float(values.mean()), float(values.mean())
    if len(values) > MOST_RESAMPLED:
        half = 1.96 * float(values.std(ddof=1)) / math.sqrt(len(values))
        return float(values.mean()) - half, float(values.mean()) + half
    random = np.random.default_rng(seed)
    means = [values[random.integers(0, len(values), len(values))].mean() for _ in range(RESAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
