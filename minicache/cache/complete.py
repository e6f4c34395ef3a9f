"""Blocks of a cache that is to be complete: what is missing or damaged raises, and the message says what to do about it."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from minicache.cache.blocks import Blocks
from minicache.cache.schema import LEDGER_COLUMNS, CachedPairs
from minicache.errors import CacheDamaged, CacheIncomplete


def check_complete(blocks: Blocks) -> None:
    """Raises CacheIncomplete unless every source was read to its end and every block of it is there."""
    open_sources = [source.name for source in blocks.log.sources if not source.complete]
    if open_sources or not blocks.log.sources:
        raise CacheIncomplete(
            f"{blocks.path}: stage one was interrupted while reading {', '.join(open_sources) or 'data'}; "
            "run the same precompute-ref again to go on"
        )
    if len(blocks) < blocks.log.blocks:
        raise CacheDamaged(f"{blocks.path}: {blocks.log.blocks} blocks were written, the arrays hold {len(blocks)}")


@contextmanager
def with_advice() -> Iterator[None]:
    """Adds to the error of a block that cannot be read what to do about it."""
    try:
        yield
    except CacheIncomplete as error:
        raise CacheIncomplete(f"{error}; run the same precompute-ref again to go on") from error
    except CacheDamaged as error:
        raise CacheDamaged(f"{error}; run the same precompute-ref again to make the block anew") from error


def block_sizes(blocks: Blocks) -> NDArray[np.int64]:
    """(blocks, 2) pairs and stored tokens of each block, by the ledger alone.

    Raises:
        CacheIncomplete, CacheDamaged: naming the first block without a ledger row.
    """
    check_complete(blocks)
    with with_advice():
        sizes = np.array([blocks.size(block) for block in range(len(blocks))], np.int64)
    if (pairs := int(sizes[:, 0].sum())) != blocks.log.pairs:
        raise CacheDamaged(f"{blocks.path}: the manifest counts {blocks.log.pairs} pairs, the blocks hold {pairs}")
    return sizes


def ledgers(blocks: Blocks) -> NDArray[np.int64]:
    """(blocks, 2, 5) the rows of both ledgers, of pairs and of scores. Raises as `block_sizes`."""
    numbers = range(len(block_sizes(blocks)))
    with with_advice():
        rows = [blocks.arrays.row(f"ledger/{what}", block) for block in numbers for what in ("pairs", "ref")]
    return np.array(rows, np.int64).reshape(-1, 2, len(LEDGER_COLUMNS))


def whole_block(blocks: Blocks, block: int) -> CachedPairs:
    """The pairs of one block and their scores. Raises CacheIncomplete, CacheDamaged."""
    with with_advice():
        return blocks.whole(block)


def each_whole_block(blocks: Blocks) -> Iterator[CachedPairs]:
    """Block after block, each checked; one in memory at a time. Raises as `block_sizes` and `whole_block`."""
    for block in range(len(block_sizes(blocks))):
        yield whole_block(blocks, block)
