"""The pairs of complete caches decoded into flat columns, in memory or in a buffer."""

import math
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

THREADS = 4  # blocks read at once: decompression and digests leave Python's lock alone
ALIGNMENT = 64  # bytes, of where a column begins in a buffer
Buffer = bytearray | mmap
Columns = TypeVar("Columns", PairTable, RefBlock)


class Contents:
    """All pairs of a cache, or of several of one identity one after another."""

    def __init__(self, parts: Sequence[Blocks]) -> None:
        self.parts = parts

    def load(self, buffer: Buffer | None = None) -> CachedPairs:
        """All pairs and their scores, in memory or in `buffer`, every block checked.

        Several blocks are read at once, each straight to its place: at most the result and a few blocks are in memory.

        buffer: of `decoded_bytes`, to hold the result.

        Raises:
            CacheIncomplete, CacheDamaged: naming the first block without a ledger row, else the first that does not fit its row.
        """
        places = [(blocks, block) for blocks in self.parts for block in range(len(blocks))]
        ends = self.sizes.cumsum(0)
        cached = self.columns(buffer)
        with with_advice(), ThreadPoolExecutor(THREADS) as threads:
            for _ in threads.map(_read_into, [cached] * len(places), places, ends):
                pass
        return cached

    @cached_property
    def sizes(self) -> NDArray[np.int64]:
        """(blocks, 2) pairs and stored tokens of each block. Raises as `load`, but for blocks that do not fit their ledger rows."""
        return np.concatenate([block_sizes(blocks) for blocks in self.parts])

    @property
    def decoded_bytes(self) -> int:
        """The bytes that the decoded columns take. Raises as `sizes`."""
        return self._layout()[1]

    def columns(self, buffer: Buffer | None = None) -> CachedPairs:
        """The columns of a buffer that `load` fills or has filled; without a buffer, new ones."""
        columns = {
            name: np.empty(shape, dtype) if buffer is None else np.ndarray(shape, dtype, buffer, place)
            for name, (shape, dtype, place) in self._layout()[0].items()
        }
        reference = [column for name, column in columns.items() if name.startswith("ref/")]
        return CachedPairs(
            PairTable(*(columns[f"pairs/{item.name}"] for item in fields(PairTable))), RefBlock(*reference)
        )

    def _layout(self) -> tuple[dict[str, tuple[tuple[int, ...], str, int]], int]:
        """Shape, dtype and first byte of each column, one after another as the fields of their tables; bytes of all."""
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
    """Read a block into its place. ends: how many pairs and tokens there are up to its end."""
    blocks, block = place
    _put(cached.table, blocks.pairs(block), ends)
    _put(cached.reference, blocks.ref(block), ends)


def _put(whole: Columns, part: Columns, ends: NDArray[np.int64]) -> None:
    """Copy a block's columns to where they end in the whole ones: (tokens,) or (pairs, any)."""
    pairs, tokens = ends
    for item in fields(part):
        values = getattr(part, item.name)
        if values is not None:
            end = tokens if values.ndim == 1 else pairs
            getattr(whole, item.name)[end - len(values) : end] = values
