"""A few numbers for each pair of a cache, complete or not; the pairs with extreme values; the origin of each pair. No torch."""

from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
from numpy.typing import NDArray

from minicache.cache.blocks import Blocks
from minicache.cache.reader import ReferenceCache
from minicache.errors import CacheDamaged, CacheError
from minicache.pairs import CHOSEN, REJECTED
from minicache.reports.inspection import PairLine

# The arrays to read, ledgers first: a block's data is written before its ledger row.
READ = ("ledger/ref", "ledger/pairs", "pairs/lengths", "pairs/source", "ref/logp_mean", "ref/token_count")
# Missing blocks that are listed one by one.
MOST_MISSING = 100_000


@dataclass
class Columns:
    """A few numbers for each of N pairs, small enough to keep a million pairs in memory.

    index: (N,) position in the cache, -1 if it is not known. lengths: (N, 3) tokens of prefix and both rests. counted: (N, 2)
    counted tokens. source: (N, 2) number of the file and line. logp_mean: (N, 2) nats per token, NaN if not scored.
    """

    index: NDArray[np.int64]
    lengths: NDArray[np.int32]
    counted: NDArray[np.int32]
    source: NDArray[np.int64]
    logp_mean: NDArray[np.float32]

    @cached_property
    def sides(self) -> NDArray[np.int32]:
        """(N, 2) tokens of the whole sides."""
        return self.lengths[:, :1] + self.lengths[:, 1:]

    @cached_property
    def scored(self) -> NDArray[np.bool_]:
        """(N,) whether a pair has scores."""
        return np.isfinite(self.logp_mean[:, CHOSEN]) & np.isfinite(self.logp_mean[:, REJECTED])

    @cached_property
    def margins(self) -> NDArray[np.float32]:
        """(N,) mean logprob of chosen minus that of rejected, nats per token; NaN if not scored."""
        margins: NDArray[np.float32] = self.logp_mean[:, CHOSEN] - self.logp_mean[:, REJECTED]
        return np.where(self.scored, margins, np.float32(np.nan))


def read_columns(cache: ReferenceCache) -> tuple[Columns, dict[int, str], dict[int, str]]:
    """The columns of all readable blocks; the blocks without pairs, and the other blocks without scores, each with the reason."""
    blocks = cache.blocks
    parts: list[tuple[np.ndarray, ...]] = [
        (np.zeros(0, np.int64), np.zeros((0, 3), np.int32), *(np.zeros((0, 2), kind) for kind in ("i4", "i8", "f4")))
    ]
    without_pairs: dict[int, str] = {}
    unscored: dict[int, str] = {}
    spans = dict(blocks.spans())
    for block, found in blocks.each(partial(_read_block, blocks)):
        if isinstance(found, CacheError):
            without_pairs[block] = str(found)
            _require_few(cache, without_pairs)
            continue
        lengths, counted, source, logp_mean, why = found
        if why:
            unscored[block] = why
        index = np.array(spans[block]) if block in spans else np.full(len(lengths), -1)
        parts.append((index, lengths, counted, source, logp_mean))
    for block in range(len(blocks), cache.log.blocks):
        without_pairs[block] = f"{cache.path}: block {block} was written, but the arrays end before it"
        _require_few(cache, without_pairs)
    index, lengths, counted, source, logp_mean = (np.concatenate(part) for part in zip(*parts, strict=True))
    columns = Columns(index=index, lengths=lengths, counted=counted, source=source, logp_mean=logp_mean)
    return columns, without_pairs, unscored


def _require_few(cache: ReferenceCache, without_pairs: dict[int, str]) -> None:
    """Raises CacheDamaged: so many blocks are missing that the metadata, which count them, are not to be believed."""
    if len(without_pairs) > MOST_MISSING:
        first = next(iter(without_pairs.values()))
        raise CacheDamaged(f"{cache.path}: more than {MOST_MISSING:,} blocks have no pairs; the first: {first}")


def _read_block(blocks: Blocks, block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, str | None]:
    """Lengths (n, 3), counted tokens (n, 2), source (n, 2), mean logprobs (n, 2) or NaN, and why logprobs are missing."""
    lengths, source = blocks.outline(block)
    ((_, scores),) = blocks.each(partial(blocks.ref, whole=False), [block])
    if isinstance(scores, CacheError):
        return lengths, blocks.counted(block, lengths), source, np.full((len(lengths), 2), np.nan, "f4"), str(scores)
    return lengths, scores.token_count, source, scores.logp_mean, None


def extreme(values: np.ndarray, most: int) -> np.ndarray:
    """Indices of the `most` smallest finite values, in ascending order; the sort is stable."""
    numbers = np.flatnonzero(np.isfinite(values))
    # A partition is faster than sorting a million values.
    if len(numbers) > most:
        numbers = numbers[values[numbers] <= np.partition(values[numbers], most)[most]]
    return numbers[np.argsort(values[numbers], kind="stable")[:most]]


def pair_lines(cache: ReferenceCache, columns: Columns, indices: np.ndarray) -> list[PairLine]:
    """The pairs at these indices of the columns as lines of a report."""
    names = [source.name for source in cache.log.sources]
    lines = []
    for index in indices.tolist():
        file, line = columns.source[index].tolist()
        logps = columns.logp_mean[index].tolist() if columns.scored[index] else None
        name = names[file] if 0 <= file < len(names) else "?"
        margin = logps[CHOSEN] - logps[REJECTED] if logps else None
        position = int(columns.index[index])
        lines.append(
            PairLine(
                index=position if position >= 0 else None,
                source=name,
                line=line,
                lengths=columns.lengths[index].tolist(),
                logp_mean=logps,
                margin=margin,
            )
        )
    return lines
