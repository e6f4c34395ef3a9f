"""Intervals of what was counted. No torch."""

import math


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
