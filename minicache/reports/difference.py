"""What differs between two caches, as plain data."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from minicache.cache.reader import ReferenceCache
from minicache.errors import CacheError, Difference
from minicache.text import ranges

FARTHEST = 5  # pairs that are listed


@dataclass(frozen=True)
class Side:
    """One of the caches. only: pairs that the other lacks. unreadable: blocks without pairs or scores, and so left out."""

    path: str
    pairs: int
    only: int
    unreadable: list[int]

    @property
    def unreadable_blocks(self) -> str:
        return ranges(self.unreadable) or "none"


@dataclass(frozen=True)
class File:
    """A preference file by its content. kept: pairs that each cache has of it; None where it did not go in."""

    name: str
    sha256: str
    kept: tuple[int | None, int | None]


@dataclass(frozen=True)
class Spread:
    """Of absolute differences, nats a token."""

    mean: float
    p99: float
    largest: float


@dataclass(frozen=True)
class SharedPair:
    """A pair that both have: where it came from, by the first; mean logprobs of chosen and rejected in each, nats a token."""

    digest: str
    file: str
    line: int
    logps_a: tuple[float, float]
    logps_b: tuple[float, float]


@dataclass(frozen=True)
class Shared:
    """The pairs that both have.

    differences: of mean logprobs of "chosen" and of "rejected", and of their "margin". flipped: pairs of which the references
    prefer another side. farthest: the pairs whose values differ most, if any do.
    """

    pairs: int
    differences: dict[str, Spread]
    flipped: int
    farthest: list[SharedPair]


@dataclass(frozen=True)
class DiffReport:
    """identity: the fields that differ, found in `a`, expected in `b`. shared: None if no pair is in both."""

    a: Side
    b: Side
    identity: list[Difference]
    files: list[File]
    shared: Shared | None


@dataclass(frozen=True)
class _Values:
    """What is read of a cache. keys: (N,) digests. source: (N, 2). means: (N, 2) float32."""

    keys: NDArray[np.void]
    source: NDArray[np.int64]
    means: NDArray[np.float32]
    unreadable: list[int]


def read_values(cache: ReferenceCache) -> _Values:
    """The values of every block that can be read."""
    keys, sources, means = [np.zeros(0, "V16")], [np.zeros((0, 2), np.int64)], [np.zeros((0, 2), np.float32)]
    unreadable = []
    for block, found in cache.blocks.each(cache.blocks.whole):
        if isinstance(found, CacheError):
            unreadable.append(block)
            continue
        table, scores = found
        keys.append(table.keys)
        sources.append(table.source)
        means.append(scores.logp_mean)
    return _Values(np.concatenate(keys), np.concatenate(sources), np.concatenate(means), unreadable)


def compare_files(first: ReferenceCache, second: ReferenceCache) -> list[File]:
    counts: list[dict[str, int]] = [
        {source.sha256: source.kept for source in cache.log.sources} for cache in (first, second)
    ]
    names = {source.sha256: source.name for cache in (second, first) for source in cache.log.sources}
    return [File(name, content, (counts[0].get(content), counts[1].get(content))) for content, name in names.items()]


def compare_values(
    cache: ReferenceCache, mine: _Values, others: _Values, at: NDArray[np.int64], at_other: NDArray[np.int64]
) -> Shared:
    """How the values of the pairs differ that lie at `at` in one cache and at `at_other` in the other."""
    a, b = mine.means[at].astype(np.float64), others.means[at_other].astype(np.float64)
    margins = [means[:, 0] - means[:, 1] for means in (a, b)]
    by_side = np.abs(a - b)
    spreads = {
        "chosen": _spread(by_side[:, 0]),
        "rejected": _spread(by_side[:, 1]),
        "margin": _spread(np.abs(margins[0] - margins[1])),
    }
    worst = by_side.max(1)
    farthest = [index for index in np.argsort(-worst, kind="stable")[:FARTHEST].tolist() if worst[index] > 0]
    names = [source.name for source in cache.log.sources]
    listed = []
    for index in farthest:
        file, line = mine.source[at[index]].tolist()
        name = names[file] if 0 <= file < len(names) else "?"
        digest = mine.keys[at[index]].tobytes().hex()
        listed.append(SharedPair(digest, name, line, tuple(a[index].tolist()), tuple(b[index].tolist())))
    flipped = int(((margins[0] > 0) != (margins[1] > 0)).sum())
    return Shared(len(at), spreads, flipped, listed)


def _spread(differences: NDArray[np.float64]) -> Spread:
    return Spread(float(differences.mean()), float(np.percentile(differences, 99)), float(differences.max()))
