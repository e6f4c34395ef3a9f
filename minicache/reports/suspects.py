"""Rows of a cache that a person should look at, by rules that docs/report.md states. Numpy only; a block at a time.

Everything is computed for all pairs of a block at once: a million pairs take minutes, not hours.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from minicache.pairs import CHOSEN, REJECTED, PairTable

Hashes = NDArray[np.uint64]
NEARLY = 0.05  # sides are nearly identical if no larger a share of the longer answer's counted tokens differs
FLIPPED = -3.5  # robust z-score of a margin: Iglewicz & Hoaglin 1993, How to detect and handle outliers
MAD_TO_SIGMA = 1.4826  # of a normal distribution
SHINGLE = 4  # tokens
SKETCH, AGREEING = 16, 14  # hashes of an answer pair's sketch; how many must agree
BAND = 4  # hashes: pairs are compared if all those of one band agree
AT_ONCE = 128  # pairs
FEWEST = 32  # counted shingles in a pair, below which an equal sketch says little
NOTHING = np.uint64(2**64 - 1)
# odd, from the golden ratio: splitmix64's increments and multipliers
STEP, FIRST, SECOND = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
FACTORS = [np.uint64((2 * number + 1) * int(STEP) % 2**64) for number in range(SKETCH)]


@dataclass(frozen=True)
class Looked:
    """What one look at the tokens of N pairs gives.

    sides: (N, 2) a hash of each whole side. differing: (N,) tokens in which the sides differ, the longest common beginning
    and end left out. sketch: (N, SKETCH) the smallest hashes of the counted tokens' shingles, NOTHING for short pairs.
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
    """The tokens of a block, some pairs at a time: what fits in a processor's own memory is done twice as fast."""
    parts = [_slice(table, start, start + AT_ONCE) for start in range(0, len(table), AT_ONCE)]
    return Looked.join([Looked(_side_hashes(part), _differing(part), _sketch(part)) for part in parts])


def _slice(table: PairTable, start: int, stop: int) -> PairTable:
    first, last = table.offsets[start], table.offsets[min(stop, len(table))]
    rows = slice(start, stop)
    return PairTable(
        table.tokens[first:last],
        table.loss_mask[first:last],
        table.lengths[rows],
        table.digest[rows],
        table.source[rows],
    )


def contradicting(sides: Hashes) -> NDArray[np.int64]:
    """(M, 2) pairs of which one's chosen side is the other's rejected side and the other way round."""
    low, high = sides.min(1), sides.max(1)
    order = np.lexsort((sides[:, CHOSEN], high, low))
    first, second = order[:-1], order[1:]
    same = (low[first] == low[second]) & (high[first] == high[second])
    swapped = same & (sides[first, CHOSEN] != sides[second, CHOSEN])
    return np.sort(np.stack([first[swapped], second[swapped]], 1), axis=1)


def nearly_identical(differing: NDArray[np.int64], counted: NDArray[np.int32]) -> NDArray[np.int64]:
    """Pairs whose sides differ in at most `NEARLY` of the longer side's counted tokens, the nearest first. counted: (N, 2)."""
    share = differing / np.maximum(counted.max(1, initial=0), 1)
    found = np.flatnonzero(share <= NEARLY)
    return found[np.argsort(share[found], kind="stable")]


def near_duplicates(sketch: Hashes) -> NDArray[np.int64]:
    """(M, 3) two pairs and how many hashes of their sketches agree, the most alike first; a pair is named beside one other only."""
    told: dict[int, tuple[int, int]] = {}
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
            told[later] = max(told.get(later, (0, 0)), (score, earlier))
    rows = [(earlier, later, score) for later, (score, earlier) in told.items()]
    return np.array(sorted(rows, key=lambda row: (-row[2], row[:2])), np.int64).reshape(-1, 3)


def robust_z(margins: NDArray[np.float64]) -> NDArray[np.float64]:
    """(N,) distance from the median in robust standard deviations; NaN where there is no margin, or no spread to measure by."""
    known = margins[np.isfinite(margins)]
    middle = np.median(known) if len(known) else np.nan
    spread = MAD_TO_SIGMA * np.median(np.abs(known - middle)) if len(known) else np.nan
    return (margins - middle) / (spread if spread > 0 else np.nan)


def perhaps_flipped(margins: NDArray[np.float64]) -> NDArray[np.int64]:
    """Pairs of which the reference prefers rejected by far more than it does in others, the most so first."""
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
    """(N, 2): sums of hashes of (token, its place in the side), so that the shared beginning is hashed once."""
    lengths = table.lengths.astype(np.int64)
    starts = table.offsets[:-1]
    place = np.arange(len(table.tokens)) - np.repeat(starts, lengths.sum(1))  # from the pair's first token
    begins = np.repeat(lengths[:, 0] + lengths[:, 1], lengths.sum(1))
    place = np.where(place >= begins, place - np.repeat(lengths[:, 1], lengths.sum(1)), place)
    hashed = _mixed((place.astype(np.uint64) << np.uint64(32)) + table.tokens.astype(np.uint64) + STEP)
    sums = np.concatenate([np.zeros(1, np.uint64), hashed.cumsum(dtype=np.uint64)])
    ends = starts[:, None] + lengths.cumsum(1)  # (N, 3) of prefix, chosen's rest, rejected's rest
    prefix = sums[ends[:, 0]] - sums[starts]
    rests = [sums[ends[:, side + 1]] - sums[ends[:, side]] for side in (CHOSEN, REJECTED)]
    return np.stack([prefix + rest for rest in rests], 1)


def _differing(table: PairTable) -> NDArray[np.int64]:
    """(N,) tokens of the longer rest that are not in an end both share."""
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
    longer: NDArray[np.int64] = lengths[:, 1:].max(1)
    return longer - shared


def _sketch(table: PairTable) -> Hashes:
    """(N, SKETCH) minhashes (Broder 1997) of the shingles that begin at a counted token."""
    starts = table.offsets[:-1]
    usable = table.loss_mask.astype(bool)
    for at in range(1, SHINGLE):  # those that would reach into the next pair
        usable[np.maximum(table.offsets[1:] - at, starts)] = False
    places = np.flatnonzero(usable)
    shingles = np.zeros(len(places), np.uint64)
    for at in range(SHINGLE):
        shingles = _mixed(shingles + table.tokens[places + at].astype(np.uint64) + STEP)
    counts = np.add.reduceat(usable, starts, dtype=np.int64)  # (N,) of each pair
    long = counts >= FEWEST
    sketch = np.full((len(table), SKETCH), NOTHING)
    if not long.any():
        return sketch
    shingles, firsts = shingles[np.repeat(long, counts)], np.r_[0, counts[long].cumsum()[:-1]]
    for number, factor in enumerate(FACTORS):
        hashed = shingles * factor  # an odd factor: a permutation
        hashed ^= hashed >> np.uint64(32)
        hashed *= SECOND
        sketch[long, number] = np.minimum.reduceat(hashed, firsts)
    return sketch
