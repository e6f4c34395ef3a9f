"""Which pairs each step of a run takes: a function of (pairs, seed, epoch, step), never of the number of processes. Numpy only."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from minicache.scoring.batching import Indices, balance


def training_steps(pairs: int, batch_size: int, epochs: float, max_steps: int | None) -> int:
    """Optimizer steps of a run: `max_steps` if given, else `epochs`, a fraction of one rounded up to a whole step."""
    return max_steps or max(1, int(np.ceil(-(-pairs // batch_size) * epochs - 1e-9)))


def pairs_in(steps: int, pairs: int, batch_size: int) -> int:
    """How many pairs so many steps take: the last batch of an epoch may be smaller."""
    epochs, rest = divmod(steps, -(-pairs // batch_size))
    return epochs * pairs + min(rest * batch_size, pairs)


@dataclass(frozen=True)
class Mixture:
    """The pairs that a run trains on, in parts: an epoch takes all of a part, or another portion of it each time.

    parts: (n,) indices of pairs, each. taken: how many of each an epoch takes.
    """

    parts: tuple[Indices, ...]
    taken: tuple[int, ...]

    @classmethod
    def of(cls, parts: Sequence[Indices], weights: Sequence[float] | None = None) -> "Mixture":
        """weights: the parts' shares in an epoch, which is then as large as it can be with no pair twice in it. None: all."""
        sizes = np.array([len(part) for part in parts])
        if weights is None:
            return cls(tuple(parts), tuple(sizes.tolist()))
        shares = np.array(weights) / sum(weights)
        taken = np.floor(shares * (sizes / shares).min() + 1e-6).astype(np.int64)  # what rounding took is no pair less
        return cls(tuple(parts), tuple(taken.clip(1, sizes).tolist()))

    def __len__(self) -> int:
        return sum(self.taken)

    @property
    def indices(self) -> Indices:
        """All pairs of all parts."""
        return np.concatenate(self.parts)

    def epoch(self, seed: int, epoch: int) -> Indices:
        """(n,) the pairs of an epoch, in their order: a function of the parts, the seed and the epoch alone."""
        pairs = np.concatenate([self._portion(number, seed, epoch) for number in range(len(self.parts))])
        return pairs[np.random.default_rng([seed, epoch]).permutation(len(pairs))]

    def _portion(self, number: int, seed: int, epoch: int) -> Indices:
        """The next of a part: it is gone through portion by portion, then in another order again."""
        part, taken = self.parts[number], self.taken[number]
        if taken == len(part):
            return part
        round_, portion = divmod(epoch, len(part) // taken)
        order = np.random.default_rng([seed, round_, number]).permutation(len(part))
        return part[order[portion * taken : (portion + 1) * taken]]


def global_batches(mixture: Mixture, batch_size: int, seed: int, first_step: int = 0) -> Iterator[Indices]:
    """The pairs of each step, epoch after epoch without end."""
    epoch, step = divmod(first_step, -(-len(mixture) // batch_size))
    while True:
        order = mixture.epoch(seed, epoch)
        for start in range(step * batch_size, len(order), batch_size):
            yield order[start : start + batch_size]
        epoch, step = epoch + 1, 0


def shares(indices: Indices, costs: Indices, size: int) -> list[Indices]:
    """Each rank's part of one global batch, by token slots. costs: (N,) of every pair of the data set. Some may be empty."""
    return [indices[group] for group in balance(costs[indices], size)]
