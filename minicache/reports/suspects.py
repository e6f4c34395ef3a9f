"""Suspicious pairs of a cache, by the rules in docs/report.md. Numpy only; a block at a time.

All pairs of a block are computed at once: a million pairs take minutes, not hours.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from minicache.pairs import CHOSEN, REJECTED, PairTable

Hashes = NDArray[np.uint64]
# Sides are nearly identical if at most this share of the longer answer's counted tokens differs.
NEARLY = 0.05
# Robust z-score of a margin. Source: Iglewicz & Hoaglin 1993, How to detect and handle outliers.
FLIPPED = -3.5
# Ratio of the standard deviation to the median absolute deviation in a normal distribution.
MAD_TO_SIGMA = 1.4826
# Tokens.
SHINGLE = 4
# Hashes of a pair's sketch; the number of them that must agree.
SKETCH, AGREEING = 16, 14
# Hashes of a band: pairs are compared if all hashes of a band agree.
BAND = 4
# Pairs.
AT_ONCE = 128
# Counted shingles of a pair; with fewer of them equal sketches mean little.
FEWEST = 32
NOTHING = np.uint64(2**64 - 1)
# Odd numbers, the first from the golden ratio: increment and multipliers of splitmix64.
STEP, FIRST, SECOND = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
FACTORS = [np.uint64((2 * number + 1) * int(STEP) % 2**64) for number in range(SKETCH)]


@dataclass(frozen=True)
class Looked:
    """The features of N pairs that are computed from their tokens.

    sides: (N, 2) a hash of each whole side. differing: (N,) tokens in which the sides differ, without their longest common
    beginning and end. sketch: (N, SKETCH) the smallest hashes of the counted tokens' shingles, NOTHING for short pairs.
    """

    sides: Hashes
    differing: NDArray[np.int64]
    sketch: Hashes

    @classmethod
    def none(cls) -> "Looked":
        return cls(np.zeros((0, 2), np.uint64), np.zeros(0, np.int64), np.zeros((0, SKETCH), np.uint64))

    @classmethod
    def join(cls, parts: list["Looked"]) -> "Looked":
        return cls(
            *(np.concatenate([getattr(part, name) for part in parts]) for name in ("sides", "differing", "sketch"))
        )


def look(table: PairTable) -> Looked:
    """The features of a block's pairs, AT_ONCE at a time: twice as fast, because the data fits the processor's cache."""
    parts = [_slice(table, start, start + AT_ONCE) for start in range(0, len(table), AT_ONCE)]
    return Looked.join([Looked(_side_hashes(part), _differing(part), _sketch(part)) for part in parts])


def _slice(table: PairTable, start: int, stop: int) -> PairTable:
    first, last = table.offsets[start], table.offsets[min(stop, len(table))]
    rows = slice(start, stop)
    return PairTable(
        tokens=table.tokens[first:last],
        loss_mask=table.loss_mask[first:last],
        lengths=table.lengths[rows],
        digest=table.digest[rows],
        source=table.source[rows],
    )


def contradicting(sides: Hashes) -> NDArray[np.int64]:
    """(M, 2) indices of two pairs with the same sides, in which chosen and rejected are swapped."""
    low, high = sides.min(1), sides.max(1)
    order = np.lexsort((sides[:, CHOSEN], high, low))
    first, second = order[:-1], order[1:]
    same = (low[first] == low[second]) & (high[first] == high[second])
    swapped = same & (sides[first, CHOSEN] != sides[second, CHOSEN])
    return np.sort(np.stack([first[swapped], second[swapped]], 1), axis=1)


def nearly_identical(differing: NDArray[np.int64], counted: NDArray[np.int32]) -> NDArray[np.int64]:
    """Indices of pairs whose sides differ in at most NEARLY of the longer side's counted tokens, the closest first.

    counted: (N, 2) counted tokens.
    """
    share = differing / np.maximum(counted.max(1, initial=0), 1)
    found = np.flatnonzero(share <= NEARLY)
    return found[np.argsort(share[found], kind="stable")]


def near_duplicates(sketch: Hashes) -> NDArray[np.int64]:
    """(M, 3) indices of two pairs and the number of equal hashes in their sketches, the most similar first.

    Every pair is listed with its most similar earlier pair only.
    """
    closest: dict[int, tuple[int, int]] = {}
    known = np.flatnonzero(sketch[:, 0] != NOTHING)
    for start in range(0, SKETCH, BAND):
        band = sketch[known, start : start + BAND]
        order = np.lexsort(band.T)
        alike = (band[order[:-1]] == band[order[1:]]).all(1)
        first, second = known[order[:-1][alike]], known[order[1:][alike]]
        agreeing = (sketch[first] == sketch[second]).sum(1)
        close = agreeing >= AGREEING
        for one, other, score in zip(
            first[close].tolist(), second[close].tolist(), agreeing[close].tolist(), strict=True
        ):
            later, earlier = max(one, other), min(one, other)
            closest[later] = max(closest.get(later, (0, 0)), (score, earlier))
    rows = [(earlier, later, score) for later, (score, earlier) in closest.items()]
    return np.array(sorted(rows, key=lambda row: (-row[2], row[:2])), np.int64).reshape(-1, 3)


def robust_z(margins: NDArray[np.float64]) -> NDArray[np.float64]:
    """(N,) distances from the median in robust standard deviations; NaN without a margin, or if the margins have no spread."""
    known = margins[np.isfinite(margins)]
    middle = np.median(known) if len(known) else np.nan
    spread = MAD_TO_SIGMA * np.median(np.abs(known - middle)) if len(known) else np.nan
    return (margins - middle) / (spread if spread > 0 else np.nan)


def perhaps_flipped(margins: NDArray[np.float64]) -> NDArray[np.int64]:
    """Indices of pairs in which the reference prefers rejected far more than in others, the most extreme first."""
    z = robust_z(margins)
    found = np.flatnonzero((z <= FLIPPED) & (margins < 0))
    return found[np.argsort(z[found], kind="stable")]


# --- one block ---


def _mixed(values: Hashes) -> Hashes:
    """splitmix64's finalizer (Steele, Lea & Flood 2014), in place."""
    for shift, factor in ((30, FIRST), (27, SECOND)):
        values ^= values >> np.uint64(shift)
        values *= factor
    values ^= values >> np.uint64(31)
    return values


def _side_hashes(table: PairTable) -> Hashes:
    """(N, 2) a hash of each side: the sum of hashes of (token, place in the side), so that the prefix is hashed once."""
    lengths = table.lengths.astype(np.int64)
    starts = table.offsets[:-1]
    # Counted from the pair's first token; for rejected's rest then as if it followed the prefix.
    place = np.arange(len(table.tokens)) - np.repeat(starts, lengths.sum(1))
    begins = np.repeat(lengths[:, 0] + lengths[:, 1], lengths.sum(1))
    place = np.where(place >= begins, place - np.repeat(lengths[:, 1], lengths.sum(1)), place)
    hashed = _mixed((place.astype(np.uint64) << np.uint64(32)) + table.tokens.astype(np.uint64) + STEP)
    sums = np.concatenate([np.zeros(1, np.uint64), hashed.cumsum(dtype=np.uint64)])
    # (N, 3) ends of prefix, chosen's rest, rejected's rest
    ends = starts[:, None] + lengths.cumsum(1)
    prefix = sums[ends[:, 0]] - sums[starts]
    rests = [sums[ends[:, side + 1]] - sums[ends[:, side]] for side in (CHOSEN, REJECTED)]
    return np.stack([prefix + rest for rest in rests], 1)


def _differing(table: PairTable) -> NDArray[np.int64]:
    """(N,) tokens of the longer rest without the common end of both rests."""
    lengths = table.lengths.astype(np.int64)
    chosen_end = table.offsets[:-1] + lengths[:, 0] + lengths[:, 1]
    rejected_end, shorter = table.offsets[1:], lengths[:, 1:].min(1)
    shared = np.zeros(len(lengths), np.int64)
    going = np.arange(len(lengths))
    while len(going := going[shared[going] < shorter[going]]):
        back = shared[going] + 1
        same = table.tokens[chosen_end[going] - back] == table.tokens[rejected_end[going] - back]
        going = going[same]
        shared[going] += 1
    differing: NDArray[np.int64] = lengths[:, 1:].max(1) - shared
    return differing


def _sketch(table: PairTable) -> Hashes:
    """(N, SKETCH) minhashes of the shingles that begin at a counted token. Source: Broder 1997."""
    starts = table.offsets[:-1]
    usable = table.loss_mask.astype(bool)
    # Shingles that would extend into the next pair are left out.
    for at in range(1, SHINGLE):
        usable[np.maximum(table.offsets[1:] - at, starts)] = False
    places = np.flatnonzero(usable)
    shingles = np.zeros(len(places), np.uint64)
    for at in range(SHINGLE):
        shingles = _mixed(shingles + table.tokens[places + at].astype(np.uint64) + STEP)
    # (N,) number of shingles of each pair
    counts = np.add.reduceat(usable, starts, dtype=np.int64)
    long = counts >= FEWEST
    sketch = np.full((len(table), SKETCH), NOTHING)
    if not long.any():
        return sketch
    shingles, firsts = shingles[np.repeat(long, counts)], np.r_[0, counts[long].cumsum()[:-1]]
    for number, factor in enumerate(FACTORS):
        # Multiplication by an odd factor is a permutation of the 64-bit numbers.
        hashed = shingles * factor
        hashed ^= hashed >> np.uint64(32)
        hashed *= SECOND
        sketch[long, number] = np.minimum.reduceat(hashed, firsts)
    return sketch
