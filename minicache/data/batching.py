"""Lengths -> batches of indices under a token budget. Pure numpy: what is batched together is decided here alone.

Batches of training are a function of (number of pairs, seed, epoch, step) and the pairs' lengths: never of how many
processes run, except for how a global batch is shared out among them.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]


def by_length(lengths: Indices, budget: int) -> list[Indices]:
    """Group rows of similar length, longest first, so that rows x longest row stays within `budget` tokens.

    lengths: (N,) tokens of each pair's longer side; a pair fills two rows of its batch's longest.
    A pair that alone exceeds the budget is a batch of its own.
    """
    batches: list[Indices] = []
    start, order = 0, np.argsort(-lengths, kind="stable")
    while start < len(order):
        size = max(1, budget // (2 * int(lengths[order[start]])))
        batches.append(order[start : start + size])
        start += size
    return batches


def balance(costs: Indices, shares: int) -> list[Indices]:
    """Split items into `shares` groups of nearly equal cost: the dearest first, each to the cheapest group so far.

    The groups together hold every index once, each in ascending order; a group may be empty.
    """
    groups: list[list[int]] = [[] for _ in range(shares)]
    totals = np.zeros(shares)
    for item in np.argsort(-np.asarray(costs), kind="stable"):
        cheapest = int(totals.argmin())
        groups[cheapest].append(int(item))
        totals[cheapest] += max(float(costs[item]), 1e-9)
    return [np.array(sorted(group), np.int64) for group in groups]


def training_steps(pairs: int, batch_size: int, epochs: float, max_steps: int | None) -> int:
    """Optimizer steps of a run: `max_steps` if given, else `epochs`, a fraction of one rounded up to a whole step."""
    return max_steps or max(1, int(np.ceil(-(-pairs // batch_size) * epochs - 1e-9)))


def global_batches(pairs: int, batch_size: int, seed: int, first_step: int = 0) -> Iterator[Indices]:
    """The indices of each step's pairs, epoch after epoch without end, each epoch in an order of its own."""
    per_epoch = -(-pairs // batch_size)
    epoch, step = divmod(first_step, per_epoch)
    while True:
        order = np.random.default_rng([seed, epoch]).permutation(pairs)
        for start in range(step * batch_size, pairs, batch_size):
            yield order[start : start + batch_size]
        epoch, step = epoch + 1, 0


def share(indices: Indices, lengths: Indices, budget: int, rank: int, size: int) -> list[Indices]:
    """A rank's micro-batches of one global batch: its part by tokens, grouped by length under the token budget.

    lengths: (N,) tokens of the longer side of every pair of the data set. May be empty if there are fewer pairs than ranks.
    """
    mine = indices[balance(lengths[indices], size)[rank]]
    return [mine[batch] for batch in by_length(lengths[mine], budget)]
