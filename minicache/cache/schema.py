"""The arrays of a cache: names, dtypes, chunks; the content of a block; the rows of the ledgers.

A cache is one zarr-3 group. A *block* is a row of every array, and the unit of work, of writing and of resuming; every chunk
belongs to one block. The second axis of the token arrays is a virtual capacity: chunks that were never written do not exist.
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
    """The specification of an array. shape: of one block. chunk: entries of a chunk along the first axis of a block."""

    shape: tuple[int, ...]
    dtype: str
    chunk: int
    fill: Any
    compress: bool = False

    @property
    def chunks(self) -> tuple[int, ...]:
        """The shape of a chunk in the array, whose first axis are the blocks."""
        return (1, self.chunk, *self.shape[1:])


def array_specs(identity: Identity) -> dict[str, ArraySpec]:
    """The specifications of all arrays of a cache, by name."""
    block = identity.block_pairs
    most = block * 2 * identity.max_length
    chunk = min(MAX_CHUNK, 1 << (most - 1).bit_length())
    capacity = -(-most // chunk) * chunk
    token_fill = 65535 if identity.token_dtype == "uint16" else -1
    specs = {
        "pairs/tokens": ArraySpec(
            shape=(capacity,), dtype=identity.token_dtype, chunk=chunk, fill=token_fill, compress=True
        ),
        "pairs/loss_mask": ArraySpec(shape=(capacity,), dtype="uint8", chunk=chunk, fill=255, compress=True),
        "pairs/lengths": ArraySpec(shape=(block, 3), dtype="int32", chunk=block, fill=-1),
        "pairs/digest": ArraySpec(shape=(block, 2), dtype="uint64", chunk=block, fill=2**64 - 1),
        "pairs/source": ArraySpec(shape=(block, 2), dtype="int64", chunk=block, fill=-1),
        "ref/logp_mean": ArraySpec(shape=(block, 2), dtype="float32", chunk=block, fill=float("nan")),
        "ref/token_count": ArraySpec(shape=(block, 2), dtype="int32", chunk=block, fill=-1),
        "ledger/pairs": ArraySpec(shape=(len(LEDGER_COLUMNS),), dtype="int64", chunk=len(LEDGER_COLUMNS), fill=-1),
        "ledger/ref": ArraySpec(shape=(len(LEDGER_COLUMNS),), dtype="int64", chunk=len(LEDGER_COLUMNS), fill=-1),
    }
    if identity.per_token:
        specs["ref/token_logps"] = ArraySpec(
            shape=(capacity,), dtype="float32", chunk=chunk, fill=float("nan"), compress=True
        )
    return specs


@dataclass(frozen=True)
class RefBlock:
    """The reference's scores of N pairs with T stored tokens.

    logp_mean: (N, 2) float32, mean logprob over the counted tokens of chosen and rejected, nats per token. token_count: (N, 2)
    int32. token_logps: (T,) float32, NaN where a token does not count; None if the cache does not store them.
    """

    logp_mean: np.ndarray
    token_count: np.ndarray
    token_logps: np.ndarray | None = None


class CachedPairs(NamedTuple):
    """Pairs and their scores."""

    table: PairTable
    reference: RefBlock

    def token_logps(self, indices: NDArray[np.int64]) -> NDArray[np.float32]:
        """(T,) logprobs of these pairs' tokens, one pair after another; NaN for tokens that do not count. Needs --per-token."""
        assert self.reference.token_logps is not None
        offsets = self.table.offsets
        return np.concatenate([self.reference.token_logps[offsets[i] : offsets[i + 1]] for i in indices])


@dataclass(frozen=True)
class ScoredPair:
    """A pair and its scores by the reference.

    index: position in the cache. file, line: origin of the pair. logp_mean: (2,) float32, mean logprob of chosen and rejected,
    nats per token. token_count: (2,) int32 tokens in that mean. token_logps: (n,) float32 for each of the pair's tokens, NaN for
    those that do not count; None unless the cache was made with --per-token.
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
        """(2,) sum over the counted tokens of each answer, nats; the value that TRL uses."""
        return self.logp_mean.astype(np.float64) * self.token_count


def pairs_row(identity: Identity, table: PairTable) -> np.ndarray:
    """(5,) int64, the ledger's row for a block of pairs."""
    data = (table.tokens, table.loss_mask, table.lengths, table.digest, table.source)
    return _row(identity, len(table), len(table.tokens), int(table.loss_mask.sum()), data)


def ref_row(identity: Identity, block: RefBlock, pairs: np.ndarray) -> np.ndarray:
    """(5,) int64, the ledger's row for the scores of a block. pairs: the row of its pairs, which becomes part of the digest."""
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
    """The identity as a ledger row stores it: the first 60 bits of its digest."""
    return int(identity.digest[:15], 16)
