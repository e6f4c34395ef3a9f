"""A number or a few for each pair of a cache, complete or not; which pairs stand out; where each came from. No torch."""

from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
from numpy.typing import NDArray

from minicache.cache.blocks import Blocks
from minicache.cache.reader import ReferenceCache
from minicache.errors import CacheError
from minicache.pairs import CHOSEN, REJECTED
from minicache.reports.inspection import PairLine

# In this order: what a row of the ledger announces was written before it.
READ = ("ledger/ref", "ledger/pairs", "pairs/lengths", "pairs/source", "ref/logp_mean", "ref/token_count")


@dataclass
class Columns:
    """A number or a few for each pair: what is kept in memory of a cache of a million."""

    index: NDArray[np.int64]  # (N,) position in the cache, -1 where it is not known
    lengths: NDArray[np.int32]  # (N, 3)
    counted: NDArray[np.int32]  # (N, 2)
    source: NDArray[np.int64]  # (N, 2)
    logp_mean: NDArray[np.float32]  # (N, 2), NaN where not scored

    @cached_property
    def sides(self) -> NDArray[np.int32]:
        return self.lengths[:, :1] + self.lengths[:, 1:]

    @cached_property
    def scored(self) -> NDArray[np.bool_]:
        return np.isfinite(self.logp_mean[:, CHOSEN]) & np.isfinite(self.logp_mean[:, REJECTED])


def read_columns(cache: ReferenceCache) -> tuple[Columns, dict[int, str], dict[int, str]]:
    """The blocks' columns; which blocks have no pairs and which of the others no scores, and why."""
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
            continue
        lengths, counted, source, logp_mean, why = found
        if why:
            unscored[block] = why
        index = np.array(spans[block]) if block in spans else np.full(len(lengths), -1)
        parts.append((index, lengths, counted, source, logp_mean))
    for block in range(len(blocks), cache.log.blocks):
        without_pairs[block] = f"{cache.path}: block {block} was written, but the arrays end before it"
    return Columns(*(np.concatenate(part) for part in zip(*parts, strict=True))), without_pairs, unscored


def _read_block(blocks: Blocks, block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, str | None]:
    """Lengths (n, 3), counted tokens (n, 2), source (n, 2), mean logprobs (n, 2) or NaN, and why there are no logprobs."""
    lengths, source = blocks.outline(block)
    ((_, scores),) = blocks.each(partial(blocks.ref, whole=False), [block])
    if isinstance(scores, CacheError):
        return lengths, blocks.counted(block, lengths), source, np.full((len(lengths), 2), np.nan, "f4"), str(scores)
    return lengths, scores.token_count, source, scores.logp_mean, None


def extreme(values: np.ndarray, most: int) -> np.ndarray:
    """Indices of the smallest values that are numbers, the first of equal ones first."""
    numbers = np.flatnonzero(np.isfinite(values))
    if len(numbers) > most:  # sorting a million takes longer than finding those worth sorting
        numbers = numbers[values[numbers] <= np.partition(values[numbers], most)[most]]
    return numbers[np.argsort(values[numbers], kind="stable")[:most]]


def pair_lines(cache: ReferenceCache, columns: Columns, indices: np.ndarray) -> list[PairLine]:
    """Some rows of the columns as lines of a report."""
    names = [source.name for source in cache.log.sources]
    lines = []
    for index in indices.tolist():
        file, line = columns.source[index].tolist()
        logps = columns.logp_mean[index].tolist() if columns.scored[index] else None
        name = names[file] if 0 <= file < len(names) else "?"
        margin = logps[CHOSEN] - logps[REJECTED] if logps else None
        position = int(columns.index[index])
        lines.append(
            PairLine(position if position >= 0 else None, name, line, columns.lengths[index].tolist(), logps, margin)
        )
    return lines
