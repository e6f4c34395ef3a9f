"""Cached pairs in other portions: some of a block, or blocks of another size."""

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from minicache.cache.schema import CachedPairs, RefBlock
from minicache.pairs import PairTable


def repack(parts: Iterable[CachedPairs], size: int) -> Iterator[CachedPairs]:
    """Blocks of `size` pairs in the same order. As in stage one, no block holds pairs of two files; so some are smaller."""
    pending: CachedPairs | None = None
    for part in parts:
        if pending and pending.table.source[0, 0] != part.table.source[0, 0]:
            yield pending
            pending = None
        pending = _joined(pending, part) if pending else part
        while len(pending.table) > size:
            yield select(pending, slice(size))
            pending = select(pending, slice(size, None))
    if pending:
        yield pending


def select(cached: CachedPairs, which: slice | NDArray[np.bool_]) -> CachedPairs:
    """Some of the pairs, by position or by an (N,) mask."""
    table, reference = cached
    chosen = np.zeros(len(table), bool)
    chosen[which] = True
    tokens = np.repeat(chosen, table.lengths.sum(1))  # (T,)
    logps = None if reference.token_logps is None else reference.token_logps[tokens]
    return CachedPairs(
        PairTable(
            table.tokens[tokens],
            table.loss_mask[tokens],
            table.lengths[which],
            table.digest[which],
            table.source[which],
        ),
        RefBlock(reference.logp_mean[which], reference.token_count[which], logps),
    )


def _joined(left: CachedPairs, right: CachedPairs) -> CachedPairs:
    parts = [left.reference, right.reference]
    per_token = [part.token_logps for part in parts if part.token_logps is not None]
    return CachedPairs(
        PairTable.concatenate([left.table, right.table]),
        RefBlock(
            np.concatenate([part.logp_mean for part in parts]),
            np.concatenate([part.token_count for part in parts]),
            np.concatenate(per_token) if per_token else None,
        ),
    )
