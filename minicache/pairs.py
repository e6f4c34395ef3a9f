"""An encoded preference pair, and a table of pairs: data/ makes them, cache/ stores them, scoring/batch.py makes tensors of them.

A pair is one sequence of tokens, `prefix | chosen's rest | rejected's rest`. The prefix is the longest beginning in which both
sides agree in ids *and* mask while each side keeps a rest of at least one token. Numpy only.
"""

from dataclasses import dataclass, fields
from functools import cached_property
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.integer]
# Indices of the side axis.
CHOSEN, REJECTED = 0, 1
# Pairs whose tokens `count_tokens` counts at once: reduceat makes an int32 copy of its input.
COUNTED_AT_ONCE = 1024


@dataclass(frozen=True)
class EncodedPair:
    """One pair as token ids.

    tokens: (n,) ids of prefix, chosen's rest, rejected's rest.
    loss_mask: (n,) uint8, 1 where the token counts in the loss.
    lengths: tokens of each of the three parts; they sum to n.
    source: index of the file in the manifest's list of sources, and the line (or row) in it from 1.
    """

    tokens: Ints
    loss_mask: NDArray[np.uint8]
    lengths: tuple[int, int, int]
    source: tuple[int, int] = (-1, -1)

    @classmethod
    def join(
        cls, chosen: Ints, chosen_mask: Ints, rejected: Ints, rejected_mask: Ints, source: tuple[int, int] = (-1, -1)
    ) -> "EncodedPair":
        """The pair of two whole sequences, their common beginning stored once. Each side must have at least one token."""
        shortest = min(len(chosen), len(rejected))
        differs = (chosen[:shortest] != rejected[:shortest]) | (chosen_mask[:shortest] != rejected_mask[:shortest])
        prefix = min(int(np.argmax(differs)) if differs.any() else shortest, shortest - 1)
        return cls(
            np.concatenate([chosen, rejected[prefix:]]),
            np.concatenate([chosen_mask, rejected_mask[prefix:]]).astype(np.uint8),
            (prefix, len(chosen) - prefix, len(rejected) - prefix),
            source,
        )

    def side(self, side: int) -> tuple[Ints, NDArray[np.uint8]]:
        """The whole sequence of CHOSEN or REJECTED: ids (length,) and loss mask (length,)."""
        prefix, chosen, _ = self.lengths
        if side == CHOSEN:
            return self.tokens[: prefix + chosen], self.loss_mask[: prefix + chosen]
        keep = np.r_[0:prefix, prefix + chosen : len(self.tokens)]
        return self.tokens[keep], self.loss_mask[keep]

    @cached_property
    def digest(self) -> bytes:
        """blake2b-128 of the pair's part lengths, ids and mask: the pair's identity everywhere."""
        state = blake2b(np.asarray(self.lengths, "<i8").tobytes(), digest_size=16)
        state.update(np.asarray(self.tokens, "<i4").tobytes())
        state.update(np.asarray(self.loss_mask, "u1").tobytes())
        return state.digest()


@dataclass(frozen=True)
class PairTable:
    """N pairs with T tokens in flat columns: a block of a cache, or a whole cache.

    tokens: (T,) uint16 or int32, the pairs one after another. loss_mask: (T,) uint8.
    lengths: (N, 3) int32, as in `EncodedPair`. digest: (N, 2) uint64. source: (N, 2) int64.
    """

    tokens: Ints
    loss_mask: NDArray[np.uint8]
    lengths: NDArray[np.int32]
    digest: NDArray[np.uint64]
    source: NDArray[np.int64]

    @classmethod
    def from_pairs(cls, pairs: list[EncodedPair], token_dtype: str) -> "PairTable":
        """The table of at least one pair. token_dtype: 'uint16' or 'int32'."""
        return cls(
            tokens=np.concatenate([pair.tokens for pair in pairs]).astype(token_dtype),
            loss_mask=np.concatenate([pair.loss_mask for pair in pairs]),
            lengths=np.array([pair.lengths for pair in pairs], np.int32),
            digest=np.array([np.frombuffer(pair.digest, "<u8") for pair in pairs], np.uint64),
            source=np.array([pair.source for pair in pairs], np.int64),
        )

    @classmethod
    def concatenate(cls, tables: list["PairTable"]) -> "PairTable":
        """The pairs of several tables in one."""
        columns = (item.name for item in fields(cls))
        return cls(**{column: np.concatenate([getattr(table, column) for table in tables]) for column in columns})

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        """(N + 1,) int64: the position in `tokens` at which each pair begins; the last entry is T."""
        return np.concatenate([[0], self.lengths.sum(1, dtype=np.int64).cumsum()])

    def __getitem__(self, index: int) -> EncodedPair:
        start, stop = self.offsets[index], self.offsets[index + 1]
        prefix, chosen, rejected = (int(n) for n in self.lengths[index])
        file, line = (int(n) for n in self.source[index])
        return EncodedPair(
            self.tokens[start:stop], self.loss_mask[start:stop], (prefix, chosen, rejected), (file, line)
        )

    def take(self, indices: Ints) -> list[EncodedPair]:
        """The pairs at these indices, (n,)."""
        return [self[int(index)] for index in indices]

    @cached_property
    def keys(self) -> NDArray[np.void]:
        """(N,) of 16 bytes each: the digests as sortable values."""
        return np.ascontiguousarray(self.digest, "<u8").view("V16").reshape(-1)

    @cached_property
    def side_lengths(self) -> NDArray[np.int64]:
        """(N, 2) int64: tokens of the whole chosen and the whole rejected sequence."""
        return (self.lengths[:, :1] + self.lengths[:, 1:]).astype(np.int64)

    @cached_property
    def token_counts(self) -> NDArray[np.int32]:
        """(N, 2) int32: counted tokens of each side; a counted prefix token counts on both."""
        return count_tokens(self.lengths, self.loss_mask)


def count_tokens(lengths: NDArray[np.int32], loss_mask: NDArray[np.uint8]) -> NDArray[np.int32]:
    """(N, 2) int32: counted tokens of each side of N pairs. lengths: (N, 3) and loss_mask: (T,) as in a `PairTable`."""
    parts = np.zeros(lengths.shape, np.int32)
    # Empty parts are left out, because reduceat would count one token for them.
    filled = lengths > 0
    end = 0
    for first in range(0, len(lengths), COUNTED_AT_ONCE):
        some = slice(first, first + COUNTED_AT_ONCE)
        sizes = lengths[some][filled[some]].astype(np.int64)
        begin, end = end, end + int(sizes.sum())
        parts[some][filled[some]] = np.add.reduceat(loss_mask[begin:end], sizes.cumsum() - sizes, dtype=np.int32)
    return parts[:, :1] + parts[:, 1:]
