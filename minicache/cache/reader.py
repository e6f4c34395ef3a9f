"""A reference cache for other programs and for the stages: pairs by position and digest, all at once, everything re-read.

docs/api.md describes it. Whole blocks are read and checked; the last one stays in memory, so pairs that lie together are read once.
"""

import re
from collections.abc import Iterator
from dataclasses import fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

from minicache.cache.blocks import Blocks
from minicache.cache.complete import check_complete, ledgers, whole_block
from minicache.cache.contents import Contents
from minicache.cache.identity import Identity
from minicache.cache.manifest import Log
from minicache.cache.places.place import Place
from minicache.cache.schema import CachedPairs, ScoredPair
from minicache.errors import CacheDamaged, CacheError
from minicache.options.where import Where
from minicache.pairs import PairTable

if TYPE_CHECKING:
    import torch


class ReferenceCache:
    """A cache on disk or in an object store, open for reading. blocks: its parts, which can be read while others are missing."""

    def __init__(self, where: Where) -> None:
        """As `open`."""
        self.blocks = Blocks(where)
        self._last: tuple[int, CachedPairs] | None = None

    @classmethod
    def open(cls, where: Where) -> Self:
        """The cache in a directory or at a URL (`s3://…`).

        Raises:
            CacheNotFound, CacheMismatch (another format version), CacheDamaged, StoreError.
        """
        return cls(where)

    @property
    def path(self) -> Where:
        return self.blocks.path

    @property
    def place(self) -> Place:
        return self.blocks.place

    @property
    def tokenizer_dir(self) -> Path:
        return self.blocks.tokenizer_dir

    @property
    def identity(self) -> Identity:
        return self.blocks.identity

    @property
    def log(self) -> Log:
        return self.blocks.log

    @cached_property
    def contents(self) -> Contents:
        return Contents([self.blocks])

    def load(self) -> CachedPairs:
        """All pairs and their scores in memory. Raises as `Contents.load`."""
        return self.contents.load()

    # --- pair by pair: of a cache that is not complete, what is asked for raises ---

    def __len__(self) -> int:
        return self.log.pairs

    def __bool__(self) -> bool:
        return True  # whatever its length: no pairs does not mean no cache

    def __iter__(self) -> Iterator[ScoredPair]:
        """All pairs in their order; one block in memory at a time."""
        return map(self.__getitem__, range(int(self._ends[-1])))

    def __getitem__(self, index: int) -> ScoredPair:
        """The pair at a position, from 0; below 0 from the end.

        Raises:
            IndexError: there is none. CacheError: its block cannot be read.
        """
        if not isinstance(index, int | np.integer):
            raise TypeError(f"expected a position, a whole number, got {index!r}")
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(f"{self.path}: there is no pair {index}; the cache holds {len(self)}, numbered from 0")
        block = int(np.searchsorted(self._ends, place, side="right"))
        if self._last is None or self._last[0] != block:
            self._last = block, whole_block(self.blocks, block)
        (table, reference), within = self._last[1], place - int(self._ends[block]) + len(self._last[1].table)
        file, line = table.source[within].tolist()
        tokens = slice(*table.offsets[within : within + 2])
        logps = reference.token_logps
        return ScoredPair(
            index=place,
            pair=table[within],
            file=self.log.sources[file].name,
            line=line,
            logp_mean=reference.logp_mean[within],
            token_count=reference.token_count[within],
            token_logps=None if logps is None else logps[tokens],
        )

    def find(self, digest: bytes | str) -> int | None:
        """Position of the pair with this digest, 16 bytes or 32 hex digits; None if there is none.

        Raises:
            ValueError: it is no such digest. CacheError: the cache cannot be read.
        """
        raw = digest
        if isinstance(digest, str):
            raw = bytes.fromhex(digest) if re.fullmatch("[0-9a-fA-F]{32}", digest) else b""
        if not isinstance(raw, bytes) or len(raw) != 16:
            raise ValueError(f"expected a digest of 16 bytes or 32 hex digits, got {digest!r}")
        wanted = np.frombuffer(raw, "V16")
        keys, order = self._keys
        place = int(np.searchsorted(keys, wanted, sorter=order)[0])
        return int(order[place]) if place < len(order) and keys[order[place]] == wanted[0] else None

    def __contains__(self, digest: object) -> bool:
        return isinstance(digest, (bytes, str)) and self.find(digest) is not None

    @property
    def complete(self) -> bool:
        """Whether everything is there, by the ledgers alone; `verify` reads everything."""
        try:
            ledgers(self.blocks)
        except CacheError:
            return False
        return True

    def to_numpy(self) -> dict[str, np.ndarray]:
        """Everything in memory: the arrays' names without their group -> values, as `docs/cache-format.md` has them.

        The pairs lie one after another: (T,) in tokens, loss_mask and token_logps, (N, …) in the others; `offsets` (N + 1,) says
        where each begins.
        """
        table, reference = self.load()
        columns = {item.name: getattr(part, item.name) for part in (table, reference) for item in fields(part)}
        return {"offsets": table.offsets, **{name: column for name, column in columns.items() if column is not None}}

    def to_torch(self) -> "dict[str, torch.Tensor]":
        """The same as tensors on the CPU, tokens as int32 and digests as the same bits in int64. Needs torch."""
        import torch

        same = {"uint16": "int32", "uint64": "int64"}
        return {
            name: torch.from_numpy(column.astype(same.get(str(column.dtype), column.dtype), copy=False))
            for name, column in self.to_numpy().items()
        }

    def check_complete(self) -> None:
        """Raises CacheIncomplete unless every source was read to its end and every block of it is there."""
        check_complete(self.blocks)

    def verify(self) -> Iterator[tuple[str, CacheError]]:
        """Re-read everything: every chunk, every ledger digest, every pair's own digest. Yields (what, problem)."""
        try:
            self.check_complete()
        except CacheError as error:
            yield "manifest", error
        for pairs, ref in zip(self.blocks.each(self._digested_pairs), self.blocks.each(self.blocks.ref), strict=True):
            for what, (_, found) in (("pairs", pairs), ("ref", ref)):
                if isinstance(found, CacheError):
                    yield what, found

    def _digested_pairs(self, block: int) -> PairTable:
        """The pairs of one block, each checked against its own digest too."""
        table = self.blocks.pairs(block)
        for position in range(len(table)):
            if table[position].digest != table.digest[position].astype("<u8").tobytes():
                raise CacheDamaged(
                    f"{self.path}: pairs/digest, block {block}: pair {position} of it is not what was digested"
                )
        return table

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        """(blocks,) pairs up to the end of each block."""
        return self.contents.sizes[:, 0].cumsum()

    @cached_property
    def _keys(self) -> tuple[NDArray[np.void], NDArray[np.int64]]:
        """(N,) digests as 16 bytes each, and the positions in which they ascend."""
        digests = np.concatenate([self.blocks.digests(block) for block in range(len(self.contents.sizes))])
        keys = np.ascontiguousarray(digests, "<u8").view("V16").reshape(-1)
        return keys, np.argsort(keys)


class JoinedCaches:
    """Several caches of one identity, their pairs one after another. A block may hold more pairs in one than in another."""

    def __init__(self, caches: list[ReferenceCache]) -> None:
        """Raises CacheMismatch: they were made for different requests."""
        for other in caches[1:]:
            require_same(caches[0], other, "be trained on", ("block_pairs",))
        self.caches = caches
        self.contents = Contents([cache.blocks for cache in caches])


def require_same(first: ReferenceCache, other: ReferenceCache, what: str, but: tuple[str, ...] = ()) -> None:
    """Raises CacheMismatch unless two caches are of one identity, `but` for some fields. what: they are to do together."""
    wanted = replace(first.identity, **{name: getattr(other.identity, name) for name in but})
    other.identity.require(
        wanted,
        f"{other.path}: cannot {what} with {first.path}",
        (str(other.path), str(first.path)),
        "Expected caches made by one model, tokenizer and options",
    )
