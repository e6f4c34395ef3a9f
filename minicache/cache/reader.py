"""Opening, checking and reading a reference cache. Refuses holes and damage; never guesses.

zarr is read a block at a time and never a row at a time: one slice costs about a millisecond (see docs/cache-format.md).
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import zarr
from numpy.typing import NDArray

from minicache.cache.schema import (
    ArraySpec,
    CachedPairs,
    Identity,
    Log,
    Manifest,
    RefBlock,
    array_specs,
    pairs_row,
    ref_row,
)
from minicache.errors import CacheDamaged, CacheError, CacheIncomplete, CacheNotFound
from minicache.pairs import EncodedPair, PairTable

# What zarr raises on bytes that are not what was written: checksum, decompression, size, metadata; OSError is the disk itself.
UNREADABLE = (ValueError, ArithmeticError, LookupError, RuntimeError, TypeError, AttributeError, OSError)


class ReferenceCache:
    """A cache on disk, open for reading.

    manifest: what it is. blocks: rows of its arrays, scored or not. tokenizer_dir: the tokenizer's own files.
    """

    mode = "r"

    def __init__(self, path: Path) -> None:
        """Open and check the manifest and every array's metadata.

        Raises:
            CacheNotFound, CacheMismatch (another format version), CacheDamaged.
        """
        self.path = path
        try:
            is_directory, is_cache = path.is_dir(), (path / "zarr.json").is_file()
        except OSError as error:
            raise CacheNotFound(f"{path}: cannot be looked into: {error.strerror}") from error
        if not is_directory:
            raise CacheNotFound(
                f"{path}: no such directory; `minidpo precompute-ref --ref-cache {path} …` makes a cache"
            )
        if not is_cache:
            raise CacheNotFound(
                f"{path}: no reference cache (it has no zarr.json); name the directory precompute-ref wrote"
            )
        store = zarr.storage.LocalStore(path, read_only=self.mode == "r")
        try:
            self.group = zarr.open_group(store, mode=self.mode, zarr_format=3, use_consolidated=False)  # type: ignore[arg-type]
            attributes = self.group.attrs.asdict()
        except UNREADABLE as error:
            raise CacheDamaged(f"{path}/zarr.json: cannot be read as a zarr group: {error}") from error
        self.manifest = Manifest.from_attributes(attributes, str(path))
        self.specs = array_specs(self.identity)
        self.arrays: dict[str, zarr.Array] = {}
        # The array that grows last is opened first: whatever another process adds meanwhile, the others have room for it.
        for name in sorted(self.specs, key=lambda name: name != "ledger/pairs"):
            self.arrays[name] = self._open_array(name, self.specs[name])

    @property
    def identity(self) -> Identity:
        return self.manifest.identity

    @property
    def log(self) -> Log:
        return self.manifest.log

    @property
    def tokenizer_dir(self) -> Path:
        return self.path / "tokenizer"

    @property
    def blocks(self) -> int:
        return self.arrays["ledger/pairs"].shape[0]

    def _open_array(self, name: str, spec: ArraySpec) -> zarr.Array:
        try:
            array = self.group[name]
        except UNREADABLE as error:
            raise CacheDamaged(f"{self.path}/{name}: the array's zarr.json is missing or damaged: {error}") from error
        if not isinstance(array, zarr.Array):
            raise CacheDamaged(f"{self.path}/{name}: expected an array, found a group")
        found = (array.shape[1:], str(array.dtype), array.chunks, str(array.fill_value))
        expected = (spec.shape, spec.dtype, spec.chunks, str(np.dtype(spec.dtype).type(spec.fill)))
        if found != expected:
            raise CacheDamaged(f"{self.path}/{name}: expected shape, dtype, chunks, fill {expected}, found {found}")
        if self.arrays and array.shape[0] < self.blocks:
            raise CacheDamaged(f"{self.path}/{name}: expected room for {self.blocks} blocks, found {array.shape[0]}")
        return array

    # --- one block ---

    def pairs(self, block: int) -> PairTable:
        """The pairs of one block, checked against the ledger.

        Raises:
            CacheIncomplete: never written. CacheDamaged: what is read is not what was written.
        """
        row = self._ledger_row("ledger/pairs", block)
        pairs, tokens = int(row[1]), int(row[2])
        table = PairTable(
            self._read("pairs/tokens", block, tokens),
            self._read("pairs/loss_mask", block, tokens),
            self._read("pairs/lengths", block, pairs),
            self._read("pairs/digest", block, pairs),
            self._read("pairs/source", block, pairs),
        )
        if not np.array_equal(pairs_row(self.identity, table), row):
            raise self._unfitting("pairs/", block)
        return table

    def ref(self, block: int) -> RefBlock:
        """What the reference said of one block, checked against the ledger. Raises as `pairs` does."""
        pairs = self._ledger_row("ledger/pairs", block)
        row = self._ledger_row("ledger/ref", block)
        count, tokens = int(row[1]), int(row[2])
        scored = RefBlock(
            self._read("ref/logp_mean", block, count),
            self._read("ref/token_count", block, count),
            self._read("ref/token_logps", block, tokens) if self.identity.per_token else None,
        )
        if not np.array_equal(ref_row(self.identity, scored, pairs), row):
            raise self._unfitting("ref/", block)
        return scored

    def _ledger_row(self, name: str, block: int) -> NDArray[np.int64]:
        try:
            row = np.asarray(self.arrays[name][block])
        except UNREADABLE as error:
            raise self._damaged(name, block, error) from error
        if (row == -1).all():
            raise CacheIncomplete(
                f"{self.path}: {name}, block {block} is missing: not finished, or its chunk was deleted"
            )
        if (row[1:4] < 0).any() or row[1] > self.identity.block_pairs or row[2] > self.specs["pairs/tokens"].shape[0]:
            raise CacheDamaged(f"{self.path}: {name}, block {block}: impossible sizes {row[1:4].tolist()}")
        return row

    def _read(self, name: str, block: int, count: int) -> np.ndarray:
        try:
            values = np.asarray(self.arrays[name][block, :count])
        except UNREADABLE as error:
            raise self._damaged(name, block, error) from error
        fill = self.arrays[name].fill_value
        if name != "ref/token_logps" and (np.isnan(values) if fill != fill else values == fill).any():
            raise CacheDamaged(f"{self.path}: {name}, block {block}: a chunk is missing")
        return values

    def _damaged(self, name: str, block: int, error: Exception) -> CacheDamaged:
        return CacheDamaged(
            f"{self.path}: {name}, block {block}: a chunk is damaged ({' '.join(str(error).split())[:120]})"
        )

    def _unfitting(self, group: str, block: int) -> CacheDamaged:
        names = ", ".join(name for name in self.specs if name.startswith(group))
        return CacheDamaged(
            f"{self.path}: one of {names}, block {block}: the data does not fit the ledger's digest (or a chunk is missing)"
        )

    # --- all blocks ---

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

    def load(self) -> CachedPairs:
        """All pairs and what the reference said of them, in memory, every block checked.

        Raises:
            CacheIncomplete, CacheDamaged: naming the first block that fails.
        """
        self.check_complete()
        tables, scores = [], []
        for block in range(self.blocks):
            try:
                tables.append(self.pairs(block))
                scores.append(self.ref(block))
            except CacheIncomplete as error:
                raise CacheIncomplete(f"{error}; run the same precompute-ref again to go on") from error
            except CacheDamaged as error:
                raise CacheDamaged(f"{error}; run the same precompute-ref again to make the block anew") from error
        table = PairTable.concatenate(tables)
        if len(table) != self.log.pairs:
            raise CacheDamaged(f"{self.path}: the manifest counts {self.log.pairs} pairs, the blocks hold {len(table)}")
        return CachedPairs(table, _concatenate(scores))

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

    def block_size(self, block: int) -> tuple[int, int]:
        """Pairs and stored tokens of a block, by the ledger; raises as `pairs` does."""
        _, pairs, tokens, _, _ = self._ledger_row("ledger/pairs", block).tolist()
        return pairs, tokens


def _concatenate(blocks: list[RefBlock]) -> RefBlock:
    per_token = [block.token_logps for block in blocks if block.token_logps is not None]
    return RefBlock(
        np.concatenate([block.logp_mean for block in blocks]),
        np.concatenate([block.token_count for block in blocks]),
        np.concatenate(per_token) if per_token else None,
    )
