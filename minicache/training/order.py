"""The pairs of each step of a run: a function of (pairs, seed, epoch, step), never of the number of processes. Numpy only."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from minicache.errors import ConfigError
from minicache.reports.curves import MOST_STEP
from minicache.scoring.batching import Indices, balance


def training_steps(pairs: int, batch_size: int, epochs: float, max_steps: int | None) -> int:
    """Optimizer steps of a run: `max_steps` if given, else those of `epochs`, rounded up.

    Raises:
        ConfigError: more steps than can be counted.
    """
    steps = max_steps or max(1.0, np.ceil(-(-pairs // batch_size) * epochs - 1e-9))
    if steps >= MOST_STEP:
        raise ConfigError(f"--epochs, --max-steps: expected fewer than {MOST_STEP:,} steps, got {steps:.3g}")
    return int(steps)


def pairs_in(steps: int, pairs: int, batch_size: int) -> int:
    """The number of pairs in the first `steps` steps: the last batch of an epoch may be smaller."""
    epochs, rest = divmod(steps, -(-pairs // batch_size))
    return epochs * pairs + min(rest * batch_size, pairs)


@dataclass(frozen=True)
class Mixture:
    """The pairs that a run trains on, in parts; an epoch takes all pairs of a part, or its next portion.

    parts: (n,) indices of pairs, one array per part. taken: the number of pairs that an epoch takes from each part.
    """

    parts: tuple[Indices, ...]
    taken: tuple[int, ...]

    @classmethod
    def of(cls, parts: Sequence[Indices], weights: Sequence[float] | None = None) -> "Mixture":
        """The mixture of these parts.

        weights: share of each part in an epoch, which is as long as possible without repeating a pair. None: all pairs.
        """
        sizes = np.array([len(part) for part in parts])
        if weights is None:
            return cls(tuple(parts), tuple(sizes.tolist()))
        shares = np.array(weights) / sum(weights)
        # The margin keeps rounding errors from costing a pair.
        taken = np.floor(shares * (sizes / shares).min() + 1e-6).astype(np.int64)
        return cls(tuple(parts), tuple(taken.clip(1, sizes).tolist()))

    def __len__(self) -> int:
        return sum(self.taken)

    def epoch(self, seed: int, epoch: int) -> Indices:
        """(n,) the pairs of an epoch in the order of training: a function of parts, seed and epoch alone."""
        pairs = np.concatenate([self._portion(number, seed, epoch) for number in range(len(self.parts))])
        return pairs[np.random.default_rng([seed, epoch]).permutation(len(pairs))]

    def _portion(self, number: int, seed: int, epoch: int) -> Indices:
        """An epoch's portion of a part: a shuffled part is used up portion by portion, then shuffled again."""
        part, taken = self.parts[number], self.taken[number]
        if taken == len(part):
            return part
        round_, portion = divmod(epoch, len(part) // taken)
        order = np.random.default_rng([seed, round_, number]).permutation(len(part))
        return part[order[portion * taken : (portion + 1) * taken]]


def global_batches(mixture: Mixture, batch_size: int, seed: int, first_step: int = 0) -> Iterator[Indices]:
    """The pairs of each step from `first_step` on, epoch after epoch without end."""
    epoch, step = divmod(first_step, -(-len(mixture) // batch_size))
    while True:
        order = mixture.epoch(seed, epoch)
        for start in range(step * batch_size, len(order), batch_size):
            yield order[start : start + batch_size]
        epoch, step = epoch + 1, 0


def shares(indices: Indices, costs: Indices, size: int) -> list[Indices]:
    """Each rank's part of one global batch, balanced by token slots; it may be empty. costs: (N,) slots of every cached pair."""
    return [indices[group] for group in balance(costs[indices], size)]
