"""Lengths of pairs -> batches of indices under a token budget. Numpy only."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]
Item = TypeVar("Item")


def ahead(items: Iterator[Item], depth: int = 2) -> Iterator[Item]:
    """The same items, made in a thread, up to `depth` ahead of their use."""
    end = object()
    with ThreadPoolExecutor(1) as thread:
        coming = deque(thread.submit(next, items, end) for _ in range(depth))
        while (item := coming.popleft().result()) is not end:
            coming.append(thread.submit(next, items, end))
            yield item  # type: ignore[misc]


def by_length(costs: Indices, budget: int, pads: bool) -> list[Indices]:
    """Batches of indices, longest pairs first, in which pairs of similar length take at most `budget` token slots.

    A pair that exceeds the budget is a batch of its own. costs: (N,) slots of each pair. pads: each pair takes as many slots as the
    longest of its batch.
    """
    batches: list[Indices] = []
    start, order = 0, np.argsort(-costs, kind="stable")
    sums = np.concatenate([[0], costs[order].cumsum()])
    while start < len(order):
        if pads:
            size = budget // int(costs[order[start]])
        else:
            size = int(np.searchsorted(sums, sums[start] + budget, side="right")) - 1 - start
        batches.append(order[start : start + max(1, size)])
        start += max(1, size)
    return batches


def balance(costs: Indices, shares: int) -> list[Indices]:
    """The indices of items in `shares` groups of nearly equal cost: largest cost first, each to the cheapest group so far.

    The indices of a group ascend; a group may be empty. costs: (N,).
    """
    groups: list[list[int]] = [[] for _ in range(shares)]
    totals = np.zeros(shares)
    for item in np.argsort(-np.asarray(costs), kind="stable"):
        cheapest = int(totals.argmin())
        groups[cheapest].append(int(item))
        totals[cheapest] += max(float(costs[item]), 1e-9)
    return [np.array(sorted(group), np.int64) for group in groups]
