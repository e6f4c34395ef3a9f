"""A reference cache as a whole: what is missing in it, all of it in memory, everything re-read."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import cached_property
from mmap import mmap
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from minicache.cache.access import PairAccess
from minicache.cache.schema import LEDGER_COLUMNS, CachedPairs, RefBlock
from minicache.errors import CacheDamaged, CacheError, CacheIncomplete
from minicache.pairs import EncodedPair, PairTable

THREADS = 4  # blocks read at once: decompression and digests leave Python's lock alone
ALIGNMENT = 64  # bytes, of where a column begins in a buffer
Buffer = bytearray | mmap
Columns = TypeVar("Columns", PairTable, RefBlock)


@contextmanager
def _with_advice() -> Iterator[None]:
    """What to do about a block that cannot be read."""
    try:
        yield
    except CacheIncomplete as error:
        raise CacheIncomplete(f"{error}; run the same precompute-ref again to go on") from error
    except CacheDamaged as error:
        raise CacheDamaged(f"{error}; run the same precompute-ref again to make the block anew") from error


class Contents(ABC):
    """What can be decoded into flat columns: the pairs of a cache, or of several one after another."""

    @property
    @abstractmethod
    def caches(self) -> list["ReferenceCache"]:
        """In their order; of one identity."""

    def load(self, buffer: Buffer | None = None) -> CachedPairs:
        """All pairs and what the reference said of them, in memory or in `buffer`, every block checked.

        Several blocks are read at once, each straight to its place: the most memory taken is the result and a few blocks.

        buffer: of `decoded_bytes`, to hold the result.

        Raises:
            CacheIncomplete, CacheDamaged: naming the first block without a ledger row, else the first that does not fit its row.
        """
        blocks = [(cache, block) for cache in self.caches for block in range(cache.blocks)]
        ends = self._sizes.cumsum(0)
        cached = self.columns(buffer)
        with _with_advice(), ThreadPoolExecutor(THREADS) as threads:
            for _ in threads.map(_read_into, [cached] * len(blocks), blocks, ends):
                pass
        return cached

    @cached_property
    def _sizes(self) -> NDArray[np.int64]:
        """(blocks, 2) pairs and stored tokens of each block of complete caches. Raises as `load`."""
        return np.concatenate([cache.block_sizes() for cache in self.caches])

    def _layout(self) -> tuple[dict[str, tuple[tuple[int, ...], str, int]], int]:
        """Shape, dtype and first byte of each column, one after another as the fields of their tables; bytes of all."""
        pairs, tokens = self._sizes.sum(0).tolist()
        places, end = {}, 0
        for group, table in (("pairs", PairTable), ("ref", RefBlock)):
            for name in (f"{group}/{item.name}" for item in fields(table)):
                if spec := self.caches[0].specs.get(name):
                    shape = (tokens if len(spec.shape) == 1 else pairs, *spec.shape[1:])
                    places[name] = shape, spec.dtype, end
                    size = math.prod(shape) * np.dtype(spec.dtype).itemsize
                    end += -(-size // ALIGNMENT) * ALIGNMENT
        return places, end

    @property
    def decoded_bytes(self) -> int:
        """What `load` takes. Raises as it, but for blocks that do not fit their ledger rows."""
        return self._layout()[1]

    def columns(self, buffer: Buffer | None = None) -> CachedPairs:
        """What `load` has put, or is to put, into a buffer; without one, new columns for it."""
        columns = {
            name: np.empty(shape, dtype) if buffer is None else np.ndarray(shape, dtype, buffer, place)
            for name, (shape, dtype, place) in self._layout()[0].items()
        }
        reference = [column for name, column in columns.items() if name.startswith("ref/")]
        return CachedPairs(
            PairTable(*(columns[f"pairs/{item.name}"] for item in fields(PairTable))), RefBlock(*reference)
        )


class ReferenceCache(Contents, PairAccess):
    """A cache on disk, open for reading."""

    @property
    def caches(self) -> list["ReferenceCache"]:
        return [self]

    def unscored(self) -> list[int]:
        """Blocks whose scores are missing or damaged."""
        return [block for block in range(self.blocks) if not self._is_scored(block)]

    def _is_scored(self, block: int) -> bool:
        try:
            self.ref(block)
        except (CacheIncomplete, CacheDamaged):
            return False
        return True

    def check_complete(self) -> None:
        """Raises CacheIncomplete unless every source was read to its end and every block of it is there."""
        open_sources = [source.name for source in self.log.sources if not source.complete]
        if open_sources or not self.log.sources:
            raise CacheIncomplete(
                f"{self.path}: stage one was interrupted while reading {', '.join(open_sources) or 'data'}; "
                "run the same precompute-ref again to go on"
            )
        if self.blocks < self.log.blocks:
            raise CacheDamaged(f"{self.path}: {self.log.blocks} blocks were written, the arrays hold {self.blocks}")

    def block_sizes(self) -> NDArray[np.int64]:
        """(blocks, 2) pairs and stored tokens of each block of a complete cache. Raises as `load`, but reads the ledger alone."""
        self.check_complete()
        with _with_advice():
            sizes = np.array([self.block_size(block) for block in range(self.blocks)], np.int64)
        if (pairs := int(sizes[:, 0].sum())) != self.log.pairs:
            raise CacheDamaged(f"{self.path}: the manifest counts {self.log.pairs} pairs, the blocks hold {pairs}")
        return sizes

    def ledgers(self) -> NDArray[np.int64]:
        """(blocks, 2, 5) the rows of both ledgers, of pairs and of scores, of a complete cache. Raises as `load`."""
        blocks = range(len(self.block_sizes()))
        with _with_advice():
            rows = [self._ledger_row(f"ledger/{what}", block) for block in blocks for what in ("pairs", "ref")]
        return np.array(rows, np.int64).reshape(-1, 2, len(LEDGER_COLUMNS))

    def each_block(self) -> Iterator[CachedPairs]:
        """Block after block of a complete cache, each checked; one in memory at a time. Raises as `load`."""
        yield from map(self.block, range(len(self.block_sizes())))

    def block(self, block: int) -> CachedPairs:
        """One block, checked. Raises as `load`."""
        with _with_advice():
            return CachedPairs(self.pairs(block), self.ref(block))

    def verify(self) -> Iterator[tuple[str, CacheError]]:
        """Re-read everything: every chunk, every ledger digest, every pair's own digest. Yields (what, problem)."""
        try:
            self.check_complete()
        except CacheError as error:
            yield "manifest", error
        for block in range(self.blocks):
            for what in ("pairs", "ref"):
                try:
                    content = getattr(self, what)(block)
                    if isinstance(content, PairTable):
                        self._check_digests(content, block)
                except (CacheIncomplete, CacheDamaged) as error:
                    yield what, error

    def _check_digests(self, table: PairTable, block: int) -> None:
        for position in range(len(table)):
            if table[position].digest != table.digest[position].astype("<u8").tobytes():
                raise CacheDamaged(
                    f"{self.path}: pairs/digest, block {block}: pair {position} of it is not what was digested"
                )

    def pair(self, index: int) -> tuple[EncodedPair, NDArray[np.float32] | None]:
        """One pair by its position in the cache, and its (2,) mean logprobs if it is scored.

        Raises:
            CacheError: there is no such pair, or its block cannot be read.
        """
        first = 0
        for block in range(self.blocks):
            pairs, _ = self.block_size(block)
            if index < first + pairs:
                try:
                    scores = self.ref(block).logp_mean[index - first]
                except CacheIncomplete:
                    scores = None
                return self.pairs(block)[index - first], scores
            first += pairs
        raise CacheError(f"{self.path}: there is no pair {index}; the cache holds {first}, numbered from 0")


class JoinedCaches(Contents):
    """Several caches of one identity, their pairs one after another. A block may hold more pairs in one than in another."""

    def __init__(self, caches: list[ReferenceCache]) -> None:
        """Raises CacheMismatch: they were made for different requests."""
        for other in caches[1:]:
            require_same(caches[0], other, "be trained on", ("block_pairs",))
        self._caches = caches

    @property
    def caches(self) -> list[ReferenceCache]:
        return self._caches


def require_same(first: ReferenceCache, other: ReferenceCache, what: str, but: tuple[str, ...] = ()) -> None:
    """Raises CacheMismatch unless two caches are of one identity, `but` for some fields. what: they are to do together."""
    wanted = replace(first.identity, **{name: getattr(other.identity, name) for name in but})
    other.identity.require(
        wanted,
        f"{other.path}: cannot {what} with {first.path}",
        (str(other.path), str(first.path)),
        "Expected caches made by one model, tokenizer and options",
    )


def _read_into(cached: CachedPairs, place: tuple[ReferenceCache, int], ends: NDArray[np.int64]) -> None:
    """Read a block into its place. ends: how many pairs and tokens there are up to its end."""
    cache, block = place
    _put(cached.table, cache.pairs(block), ends)
    _put(cached.reference, cache.ref(block), ends)


def _put(whole: Columns, part: Columns, ends: NDArray[np.int64]) -> None:
    """Copy a block's columns to where they end in the whole ones: (tokens,) or (pairs, any)."""
    pairs, tokens = ends
    for item in fields(part):
        values = getattr(part, item.name)
        if values is not None:
            end = tokens if values.ndim == 1 else pairs
            getattr(whole, item.name)[end - len(values) : end] = values
