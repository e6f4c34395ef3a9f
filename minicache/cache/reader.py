"""A reference cache for other programs and for the stages: single pairs by position or digest, all pairs, verification.

docs/api.md describes it. Whole blocks are read and checked. The last one stays in memory, so pairs that lie together are read once.
"""

import re
from collections.abc import Iterator
from dataclasses import fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

from minicache.cache.blocks import Blocks, OpenCache
from minicache.cache.complete import check_complete, ledgers, whole_block
from minicache.cache.contents import Contents
from minicache.cache.schema import CachedPairs, ScoredPair
from minicache.errors import CacheDamaged, CacheError
from minicache.options.where import Where
from minicache.pairs import PairTable

if TYPE_CHECKING:
    import torch


class ReferenceCache(OpenCache):
    """A cache on disk or in an object store, open for reading. blocks: its blocks, readable also in an incomplete cache."""

    def __init__(self, where: Where) -> None:
        """Open the cache, as `open`."""
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
    def tokenizer_dir(self) -> Path:
        return self.blocks.tokenizer_dir

    @cached_property
    def contents(self) -> Contents:
        return Contents([self.blocks])

    def load(self) -> CachedPairs:
        """All pairs and their scores in memory. Raises as `Contents.load`."""
        return self.contents.load()

    # --- single pairs; all of these raise for a cache that is not complete ---

    def __len__(self) -> int:
        return self.log.pairs

    def __bool__(self) -> bool:
        """Always true: without this, `len` would make an empty cache false."""
        return True

    def __iter__(self) -> Iterator[ScoredPair]:
        """All pairs in their order; one block at a time is in memory."""
        return map(self.__getitem__, range(int(self._ends[-1])))

    def __getitem__(self, index: int) -> ScoredPair:
        """The pair at a position, counted from 0, or from the end if below 0.

        Raises:
            IndexError: there is no such pair. CacheError: its block cannot be read.
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
        """The position of the pair with this digest, 16 bytes or 32 hex digits; None if there is no such pair.

        Raises:
            ValueError: the argument is not a digest. CacheError: the cache cannot be read.
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
        """Whether all pairs and scores exist, by the ledgers alone; `verify` reads everything."""
        try:
            ledgers(self.blocks)
        except CacheError:
            return False
        return True

    def to_numpy(self) -> dict[str, np.ndarray]:
        """All arrays in memory by their names without the group, as `docs/cache-format.md` describes them.

        The pairs lie one after another: (T,) in tokens, loss_mask and token_logps, (N, …) in the others. `offsets` (N + 1,) holds
        the first token of each pair.
        """
        table, reference = self.load()
        columns = {item.name: getattr(part, item.name) for part in (table, reference) for item in fields(part)}
        return {"offsets": table.offsets, **{name: column for name, column in columns.items() if column is not None}}

    def to_torch(self) -> "dict[str, torch.Tensor]":
        """`to_numpy` as tensors on the CPU: tokens as int32, digests as the same bits in int64. Needs torch."""
        import torch

        same = {"uint16": "int32", "uint64": "int64"}
        return {
            name: torch.from_numpy(column.astype(same.get(str(column.dtype), column.dtype), copy=False))
            for name, column in self.to_numpy().items()
        }

    def check_complete(self) -> None:
        """Raises CacheIncomplete: a source was not read to its end. CacheDamaged: blocks of it are missing."""
        check_complete(self.blocks)

    def verify(self) -> Iterator[tuple[str, CacheError]]:
        """Re-read everything and check every digest, of ledgers and of pairs. Yields ("manifest", "pairs" or "ref", problem)."""
        try:
            self.check_complete()
        except CacheError as error:
            yield "manifest", error
        for pairs, ref in zip(self.blocks.each(self._digested_pairs), self.blocks.each(self.blocks.ref), strict=True):
            for what, (_, found) in (("pairs", pairs), ("ref", ref)):
                if isinstance(found, CacheError):
                    yield what, found
            table, scores = pairs[1], ref[1]
            if isinstance(table, CacheError) or isinstance(scores, CacheError):
                continue
            if problem := self.blocks.disagreement(pairs[0], CachedPairs(table, scores)):
                yield "ref", problem

    def _digested_pairs(self, block: int) -> PairTable:
        """The pairs of a block, each checked against its own digest too."""
        table = self.blocks.pairs(block)
        for position in range(len(table)):
            if table[position].digest != table.digest[position].astype("<u8").tobytes():
                raise CacheDamaged(
                    f"{self.path}: pairs/digest, block {block}: pair {position} of the block does not fit its digest"
                )
        return table

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        """(blocks,) the number of pairs up to the end of each block."""
        return self.contents.sizes[:, 0].cumsum()

    @cached_property
    def _keys(self) -> tuple[NDArray[np.void], NDArray[np.int64]]:
        """(N,) digests of 16 bytes, and the positions that sort them."""
        digests = np.concatenate([self.blocks.digests(block) for block in range(len(self.contents.sizes))])
        keys = np.ascontiguousarray(digests, "<u8").view("V16").reshape(-1)
        return keys, np.argsort(keys)


class JoinedCaches:
    """Several caches of one identity, their pairs one after another. Their sizes of blocks may differ."""

    def __init__(self, caches: list[ReferenceCache]) -> None:
        """Join open caches. Raises CacheMismatch: they were made for different requests."""
        for other in caches[1:]:
            require_same(caches[0], other, "be trained on", ("block_pairs",))
        self.caches = caches
        self.contents = Contents([cache.blocks for cache in caches])


def require_same(first: ReferenceCache, other: ReferenceCache, what: str, but: tuple[str, ...] = ()) -> None:
    """Raises CacheMismatch: two caches differ in a field of their identities other than `but`.

    what: the purpose of joining them, for the message, such as "be merged".
    """
    wanted = replace(first.identity, **{name: getattr(other.identity, name) for name in but})
    other.identity.require(
        wanted,
        f"{other.path}: cannot {what} with {first.path}",
        (str(other.path), str(first.path)),
        "Expected caches made by one model, tokenizer and options",
    )
