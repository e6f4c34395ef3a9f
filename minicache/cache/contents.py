"""The pairs of complete caches decoded into flat columns, in memory or in a buffer."""

import logging
import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from functools import cached_property
from mmap import mmap
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from minicache.cache.blocks import Blocks
from minicache.cache.complete import block_sizes, with_advice
from minicache.cache.schema import CachedPairs, RefBlock
from minicache.pairs import PairTable

log = logging.getLogger(__name__)

# Blocks read at once: decompression and digests release Python's lock.
THREADS = 4
# Columns begin at multiples of so many bytes in a buffer.
ALIGNMENT = 64
Buffer = bytearray | mmap
Columns = TypeVar("Columns", PairTable, RefBlock)


class Contents:
    """All pairs of a cache, or of several caches of one identity, one after another."""

    def __init__(self, parts: Sequence[Blocks]) -> None:
        self.parts = parts

    def load(self, buffer: Buffer | None = None) -> CachedPairs:
        """All pairs and their scores, in memory or in `buffer`, every block checked.

        Several blocks are read at once, each directly to its place: at most the result and a few blocks are in memory.

        buffer: of `decoded_bytes` bytes, for the result.

        Raises:
            CacheIncomplete, CacheDamaged: naming the first block without a ledger row, else the first that does not fit its row.
        """
        started = time.monotonic()
        places = [(blocks, block) for blocks in self.parts for block in range(len(blocks))]
        ends = self.sizes.cumsum(0)
        cached = self.columns(buffer)
        with with_advice(), ThreadPoolExecutor(THREADS) as threads:
            for _ in threads.map(_read_into, [cached] * len(places), places, ends):
                pass
        seconds = time.monotonic() - started
        log.debug(
            "%d blocks decoded: %d pairs, %d bytes, %.1f s", len(places), ends[-1][0], self.decoded_bytes, seconds
        )
        return cached

    @cached_property
    def sizes(self) -> NDArray[np.int64]:
        """(blocks, 2) pairs and stored tokens of each block, by the ledgers alone. Raises as `block_sizes`."""
        return np.concatenate([block_sizes(blocks) for blocks in self.parts])

    @property
    def decoded_bytes(self) -> int:
        """The bytes that the decoded columns take. Raises as `sizes`."""
        return self._layout()[1]

    def columns(self, buffer: Buffer | None = None) -> CachedPairs:
        """The columns in a buffer for `load`, or filled by it; without a buffer, new ones in memory."""
        columns = {
            name: np.empty(shape, dtype) if buffer is None else np.ndarray(shape, dtype, buffer, place)
            for name, (shape, dtype, place) in self._layout()[0].items()
        }
        tables = [
            {name.removeprefix(group): column for name, column in columns.items() if name.startswith(group)}
            for group in ("pairs/", "ref/")
        ]
        return CachedPairs(PairTable(**tables[0]), RefBlock(**tables[1]))

    def _layout(self) -> tuple[dict[str, tuple[tuple[int, ...], str, int]], int]:
        """Shape, dtype and first byte of each column, in the order of the tables' fields; the number of bytes of all."""
        pairs, tokens = self.sizes.sum(0).tolist()
        places, end = {}, 0
        for group, table in (("pairs", PairTable), ("ref", RefBlock)):
            for name in (f"{group}/{item.name}" for item in fields(table)):
                if spec := self.parts[0].arrays.specs.get(name):
                    shape = (tokens if len(spec.shape) == 1 else pairs, *spec.shape[1:])
                    places[name] = shape, spec.dtype, end
                    size = math.prod(shape) * np.dtype(spec.dtype).itemsize
                    end += -(-size // ALIGNMENT) * ALIGNMENT
        return places, end


def _read_into(cached: CachedPairs, place: tuple[Blocks, int], ends: NDArray[np.int64]) -> None:
    """Read a block into its place. ends: the numbers of pairs and of tokens up to its end."""
    blocks, block = place
    found = blocks.whole(block)
    _put(cached.table, found.table, ends)
    _put(cached.reference, found.reference, ends)


def _put(whole: Columns, part: Columns, ends: NDArray[np.int64]) -> None:
    """Copy a block's columns into the whole ones, (tokens,) or (pairs, any), so that they end at `ends`."""
    pairs, tokens = ends
    for item in fields(part):
        values = getattr(part, item.name)
        if values is not None:
            end = tokens if values.ndim == 1 else pairs
            getattr(whole, item.name)[end - len(values) : end] = values
