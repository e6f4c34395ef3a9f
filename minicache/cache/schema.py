"""The arrays of a cache on disk: names, dtypes, chunks; what a block of them holds; the ledger's rows.

One zarr-3 group. A *block* is a row of every array and the unit of work, of writing and of resuming; every chunk belongs to
one block. The second axis of the token arrays is a virtual capacity: chunks never written do not exist.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from minicache.cache.identity import Identity
from minicache.pairs import EncodedPair, PairTable

MAX_CHUNK = 2**20
LEDGER_COLUMNS = ("identity", "pairs", "tokens", "counted", "digest")


@dataclass(frozen=True)
class ArraySpec:
    """shape[0] is the number of blocks; a chunk is one block's `chunk` entries along the second axis."""

    shape: tuple[int, ...]
    dtype: str
    chunk: int
    fill: Any
    compress: bool = False

    @property
    def chunks(self) -> tuple[int, ...]:
        return (1, self.chunk, *self.shape[1:])


def array_specs(identity: Identity) -> dict[str, ArraySpec]:
    """Every array of a cache; `shape` without the leading axis of blocks."""
    block = identity.block_pairs
    most = block * 2 * identity.max_length
    chunk = min(MAX_CHUNK, 1 << (most - 1).bit_length())
    capacity = -(-most // chunk) * chunk
    token_fill = 65535 if identity.token_dtype == "uint16" else -1
    specs = {
        "pairs/tokens": ArraySpec((capacity,), identity.token_dtype, chunk, token_fill, compress=True),
        "pairs/loss_mask": ArraySpec((capacity,), "uint8", chunk, 255, compress=True),
        "pairs/lengths": ArraySpec((block, 3), "int32", block, -1),
        "pairs/digest": ArraySpec((block, 2), "uint64", block, 2**64 - 1),
        "pairs/source": ArraySpec((block, 2), "int64", block, -1),
        "ref/logp_mean": ArraySpec((block, 2), "float32", block, float("nan")),
        "ref/token_count": ArraySpec((block, 2), "int32", block, -1),
        "ledger/pairs": ArraySpec((len(LEDGER_COLUMNS),), "int64", len(LEDGER_COLUMNS), -1),
        "ledger/ref": ArraySpec((len(LEDGER_COLUMNS),), "int64", len(LEDGER_COLUMNS), -1),
    }
    if identity.per_token:
        specs["ref/token_logps"] = ArraySpec((capacity,), "float32", chunk, float("nan"), compress=True)
    return specs


@dataclass(frozen=True)
class RefBlock:
    """The reference's scores of some pairs.

    logp_mean: (N, 2) float32, masked mean logprob of chosen and rejected, nats a token. token_count: (N, 2) int32.
    token_logps: (T,) float32, NaN where a token does not count; None if the cache does not keep them.
    """

    logp_mean: np.ndarray
    token_count: np.ndarray
    token_logps: np.ndarray | None = None


class CachedPairs(NamedTuple):
    """Pairs and their scores."""

    table: PairTable
    reference: RefBlock

    def token_logps(self, indices: NDArray[np.int64]) -> NDArray[np.float32]:
        """(T,) logprobs of these pairs' tokens, one pair after another; NaN where one does not count. Needs --per-token."""
        assert self.reference.token_logps is not None
        offsets = self.table.offsets
        return np.concatenate([self.reference.token_logps[offsets[i] : offsets[i + 1]] for i in indices])


@dataclass(frozen=True)
class ScoredPair:
    """A pair and its scores by the reference.

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


def pairs_row(identity: Identity, table: PairTable) -> np.ndarray:
    """(5,) int64: the ledger's row for a block of pairs."""
    data = (table.tokens, table.loss_mask, table.lengths, table.digest, table.source)
    return _row(identity, len(table), len(table.tokens), int(table.loss_mask.sum()), data)


def ref_row(identity: Identity, block: RefBlock, pairs: np.ndarray) -> np.ndarray:
    """(5,) int64: the ledger's row for a scored block; `pairs`, the row of the pairs it scored, is part of its digest."""
    data = [pairs.astype("<i8"), block.logp_mean, block.token_count]
    if identity.per_token and block.token_logps is not None:
        data.append(block.token_logps)
    return _row(identity, len(block.logp_mean), int(pairs[2]), int(block.token_count.sum()), data)


def _row(identity: Identity, pairs: int, tokens: int, counted: int, data: Iterable[np.ndarray]) -> np.ndarray:
    state = blake2b(digest_size=8)
    for array in data:
        state.update(np.ascontiguousarray(array).data)
    digest = int.from_bytes(state.digest(), "little", signed=True)
    return np.array([identity_number(identity), pairs, tokens, counted, digest], np.int64)


def identity_number(identity: Identity) -> int:
    """The identity as a ledger row holds it: the first 60 bits of its digest."""
    return int(identity.digest[:15], 16)
