"""Creating a reference cache and writing blocks into it.

Crash safety: the data of a block is written and flushed first, its ledger row last. A block whose row is missing or does not fit
the data counts as not written, so a kill at any instant costs at most the blocks in flight. The processes of a run may write
different blocks at the same time without locks. Only one of them creates the cache, grows it and writes the log, and its claim
keeps other runs out.
"""

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec

from minicache.cache.blocks import TOKENIZER, Blocks, OpenCache
from minicache.cache.manifest import Log, Manifest
from minicache.cache.places.bounded import BoundedStore
from minicache.cache.places.claims import CLAIM_FILE
from minicache.cache.places.directory import remove_drafts
from minicache.cache.places.opening import place_at
from minicache.cache.places.place import ROOT
from minicache.cache.schema import CachedPairs, RefBlock, array_specs, pairs_row, ref_row
from minicache.drafts import draft_beside
from minicache.failures import writing
from minicache.options.where import Where
from minicache.pairs import PairTable
from minicache.trackers import Tracker

log = logging.getLogger(__name__)


class CacheWriter(OpenCache):
    """A cache on disk or in an object store, open for writing. blocks: reads it."""

    def __init__(self, where: Where) -> None:
        """Open an existing cache. Raises as `ReferenceCache.open`."""
        self.blocks = Blocks(where, writable=True)
        self._arrays = self.blocks.arrays

    @classmethod
    def create(cls, where: Where, manifest: Manifest, write_tokenizer: Callable[[Path], object]) -> "CacheWriter":
        """Make an empty cache, complete or not at all. write_tokenizer: fills the directory of the tokenizer's files.

        Raises:
            OutputError: something lies there already, or it cannot be written.
        """
        place = place_at(where)
        place.require_free()
        with draft_beside(place.home) as draft:
            with writing(place):
                draft.parent.mkdir(parents=True, exist_ok=True)
                _create_arrays(draft, manifest)
                write_tokenizer(draft / TOKENIZER)
                (draft / CLAIM_FILE).touch()
            place.publish(draft)
        remove_drafts(place.home)
        return cls(where)

    def remove_leftovers_of(self, blocks: Iterable[int]) -> None:
        """Delete unfinished files of killed writers in these blocks. No other process may write these blocks meanwhile."""
        self.place.remove_partial(f"{name}/c/{block}" for block in blocks for name in self._arrays.specs)

    def grow(self, blocks: int) -> None:
        """Make room for `blocks` blocks. The ledger of pairs grows last, so every array has room for each of its rows."""
        self._resize([name for name, array in self._others() if array.shape[0] < blocks], blocks)
        if len(self.blocks) < blocks:
            self._resize(["ledger/pairs"], blocks)

    def shrink(self, blocks: int) -> None:
        """Drop blocks of a failed call from the end. The ledger of pairs shrinks first."""
        if len(self.blocks) > blocks:
            self._resize(["ledger/pairs"], blocks)
        self._resize([name for name, array in self._others() if array.shape[0] > blocks], blocks)

    def _others(self) -> "list[tuple[str, zarr.Array[Any]]]":
        """All arrays but the ledger of pairs."""
        return [(name, array) for name, array in self._arrays.by_name.items() if name != "ledger/pairs"]

    def _resize(self, names: list[str], blocks: int) -> None:
        with writing(self.place):
            for name in names:
                self._arrays.by_name[name].resize((blocks, *self._arrays.by_name[name].shape[1:]))
            self.place.flush((f"{name}/{ROOT}" for name in names), folders=False)

    def write_log(self, log: Log | None = None) -> None:
        """Store the log. log: replaces the present one."""
        if log is not None:
            self._arrays.manifest = replace(self._arrays.manifest, log=log)
        with writing(self.place):
            self._arrays.group.attrs.put(self._arrays.manifest.to_attributes())
            self.place.flush([ROOT])

    def append(self, blocks: Iterable[CachedPairs], tracker: Tracker) -> None:
        """Store whole blocks after those that are there."""
        for block, (table, scores) in enumerate(blocks, len(self.blocks)):
            self.grow(block + 1)
            self.write_pairs(block, table)
            self.write_ref(block, scores)
            tracker.advance(len(table), len(table.tokens))

    def write_pairs(self, block: int, table: PairTable) -> None:
        """Store the pairs of a block."""
        self._commit(
            "ledger/pairs",
            block,
            pairs_row(self.identity, table),
            {
                "pairs/tokens": table.tokens,
                "pairs/loss_mask": table.loss_mask,
                "pairs/lengths": table.lengths,
                "pairs/digest": table.digest,
                "pairs/source": table.source,
            },
        )

    def write_ref(self, block: int, scores: RefBlock) -> None:
        """Store the scores of a block. All mean logprobs must be finite."""
        assert np.isfinite(scores.logp_mean).all(), "non-finite scores must be refused before they are written"
        columns = {"ref/logp_mean": scores.logp_mean, "ref/token_count": scores.token_count}
        if self.identity.per_token:
            assert scores.token_logps is not None
            columns["ref/token_logps"] = scores.token_logps
        row = ref_row(self.identity, scores, self._arrays.row("ledger/pairs", block))
        self._commit("ledger/ref", block, row, columns)

    def _commit(self, ledger: str, block: int, row: np.ndarray, columns: dict[str, np.ndarray]) -> None:
        """Write and flush the columns of a block, then its ledger row."""
        started = time.monotonic()
        with writing(self.place):
            self.place.flush([key for name, values in columns.items() for key in self._write(name, block, values)])
            self._arrays.by_name[ledger][block] = row
            self.place.flush([self._arrays.chunk_key(ledger, block, 0)])
        log.debug("%s, block %d written: %d pairs, %.1f s", ledger, block, row[1], time.monotonic() - started)

    def _write(self, name: str, block: int, values: np.ndarray) -> list[str]:
        """Write whole chunks, padded with the fill value; returns their names. zarr need not read, nor touch other blocks."""
        spec = self._arrays.specs[name]
        chunks = -(-len(values) // spec.chunk)
        padded = np.full((chunks * spec.chunk, *spec.shape[1:]), spec.fill, spec.dtype)
        padded[: len(values)] = values
        self._arrays.by_name[name][block, : len(padded)] = padded
        return [self._arrays.chunk_key(name, block, chunk) for chunk in range(chunks)]


def _create_arrays(draft: Path, manifest: Manifest) -> None:
    """Make the zarr group with its manifest and with arrays of no blocks."""
    group = zarr.create_group(BoundedStore(draft), attributes=manifest.to_attributes())
    for name, spec in array_specs(manifest.identity).items():
        group.create_array(
            name,
            shape=(0, *spec.shape),
            dtype=spec.dtype,
            chunks=spec.chunks,
            fill_value=spec.fill,
            compressors=[*([ZstdCodec(level=3)] if spec.compress else []), Crc32cCodec()],
        )
