"""A cache pair by pair, for other programs: iteration, positions, digests. The page is docs/api.md.

Every way reads whole blocks and checks them. The last block stays in memory, so pairs that lie together are read once.
"""

import re
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

from minicache.cache.blocks import CacheBlocks
from minicache.cache.schema import CachedPairs
from minicache.errors import CacheError
from minicache.options.where import Where
from minicache.pairs import EncodedPair

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ScoredPair:
    """A pair and what the reference thinks of it.

    index: its position in the cache. file, line: where it came from. logp_mean: (2,) float32, mean logprob of chosen and rejected,
    nats a token. token_count: (2,) int32 tokens in that mean. token_logps: (n,) float32 beside the pair's tokens, NaN where one
    does not count; None unless the cache was made with --per-token.
    """

    index: int
    pair: EncodedPair
    file: str
    line: int
    logp_mean: NDArray[np.float32]
    token_count: NDArray[np.int32]
    token_logps: NDArray[np.float32] | None = None

    @property
    def logp_sum(self) -> NDArray[np.float64]:
        """(2,) sum over each answer's counted tokens, nats: what TRL compares."""
        return self.logp_mean.astype(np.float64) * self.token_count


class PairAccess(CacheBlocks):
    """The part of a reference cache that hands out single pairs. Of a cache that is not complete, what is asked for raises."""

    @classmethod
    def open(cls, where: Where) -> Self:
        """The cache in a directory or at a URL (`s3://…`).

        Raises:
            CacheNotFound, CacheMismatch (another format version), CacheDamaged, StoreError.
        """
        return cls(where)

    @abstractmethod
    def block_sizes(self) -> NDArray[np.int64]: ...

    @abstractmethod
    def block(self, block: int) -> CachedPairs: ...

    @abstractmethod
    def load(self) -> CachedPairs: ...

    def __len__(self) -> int:
        return self.log.pairs

    def __bool__(self) -> bool:
        return True  # a cache is one, however many pairs it holds

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
            self._last = block, self.block(block)
        (table, reference), within = self._last[1], place - int(self._ends[block]) + len(self._last[1].table)
        file, line = table.source[within].tolist()
        tokens = slice(*table.offsets[within : within + 2])
        logps = reference.token_logps
        return ScoredPair(
            place,
            table[within],
            self.log.sources[file].name,
            line,
            reference.logp_mean[within],
            reference.token_count[within],
            None if logps is None else logps[tokens],
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
        """Whether all of it is there, as far as the ledgers tell; `verify` reads everything."""
        try:
            self.block_sizes()
            for block in range(self.blocks):
                self._ledger_row("ledger/ref", block)
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

    _last: tuple[int, CachedPairs] | None = None

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        """(blocks,) pairs up to the end of each block."""
        return self.block_sizes()[:, 0].cumsum()

    @cached_property
    def _keys(self) -> tuple[NDArray[np.void], NDArray[np.int64]]:
        """(N,) digests as 16 bytes each, and the positions in which they ascend."""
        sizes = self.block_sizes()[:, 0].tolist()
        digests = np.concatenate([self._read("pairs/digest", block, size) for block, size in enumerate(sizes)])
        keys = np.ascontiguousarray(digests, "<u8").view("V16").reshape(-1)
        return keys, np.argsort(keys)
