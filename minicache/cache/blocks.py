"""Opening a reference cache and reading single blocks of it. Refuses holes and damage; never guesses.

zarr is read a block at a time and never a row at a time: one slice costs about a millisecond (see docs/cache-format.md).
"""

from collections.abc import Iterable
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import numpy as np
import zarr
from numpy.typing import NDArray

from minicache.cache.identity import Identity
from minicache.cache.manifest import Log, Manifest
from minicache.cache.places.opening import place_at
from minicache.cache.places.place import ROOT
from minicache.cache.schema import LEDGER_COLUMNS, ArraySpec, RefBlock, array_specs, identity_number, pairs_row, ref_row
from minicache.errors import CacheDamaged, CacheIncomplete
from minicache.options.where import Where
from minicache.pairs import PairTable, count_tokens

# What zarr raises on bytes that are not what was written: checksum, decompression, size, metadata; OSError is the disk itself.
UNREADABLE = (
    ValueError,
    ArithmeticError,
    LookupError,
    RuntimeError,
    TypeError,
    AttributeError,
    OSError,
    MemoryError,
    AssertionError,
)
MOST_BLOCKS = 2**24  # more is no cache, but metadata that makes its readers count for ever
MOST_HELD = 2**32  # bytes
TOKENIZER = "tokenizer"


class CacheBlocks:
    """A cache on disk or in an object store, block by block.

    manifest: what it is. blocks: rows of its arrays, scored or not. tokenizer_dir: the tokenizer's own files.
    """

    mode = "r"

    def __init__(self, where: Where) -> None:
        """Open and check the manifest and every array's metadata.

        Raises:
            CacheNotFound, CacheMismatch (another format version), CacheDamaged, StoreError.
        """
        self.place = place_at(where)
        self.path = self.place.where
        self.place.require_cache()
        store = self.place.store(read_only=self.mode == "r")
        try:
            self.group = zarr.open_group(store, mode=self.mode, zarr_format=3, use_consolidated=False)  # type: ignore[arg-type]
            attributes = self.group.attrs.asdict()
        except UNREADABLE as error:
            raise CacheDamaged(f"{self.path}/{ROOT}: cannot be read as a zarr group: {error}") from error
        self.manifest = Manifest.from_attributes(attributes, str(self.path))
        self.specs = array_specs(self.identity)
        self.arrays: dict[str, zarr.Array] = {}
        self.held: dict[str, np.ndarray] = {}
        # The array that grows last is opened first: whatever another process adds meanwhile, the others have room for it.
        for name in sorted(self.specs, key=lambda name: name != "ledger/pairs"):
            self.arrays[name] = self._open_array(name, self.specs[name])

    @property
    def identity(self) -> Identity:
        return self.manifest.identity

    @property
    def log(self) -> Log:
        return self.manifest.log

    @cached_property
    def tokenizer_dir(self) -> Path:
        """May be a copy: to change it, put another folder in its place.

        Raises:
            CacheDamaged: something in it is no file, but a link or a device.
        """
        folder = self.place.folder(TOKENIZER)
        for file in [folder] if folder.is_symlink() else folder.rglob("*"):
            if file.is_symlink() or not (file.is_file() or file.is_dir()):
                raise CacheDamaged(
                    f"{file}: expected a file; the same precompute-ref again puts the tokenizer there anew"
                )
        return folder

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
        if array.shape[0] > MOST_BLOCKS:
            raise CacheDamaged(f"{self.path}/{name}: expected {MOST_BLOCKS:,} blocks or fewer, found {array.shape[0]}")
        if self.arrays and array.shape[0] < self.blocks:
            raise CacheDamaged(f"{self.path}/{name}: expected room for {self.blocks} blocks, found {array.shape[0]}")
        return array

    def hold(self, names: Iterable[str]) -> None:
        """Read these arrays at once and take their blocks from memory from now on: four times as fast as one after another.

        Later changes are not seen. An array with a chunk that cannot be read stays on disk, so that the error can name the block.
        """
        for name in names:
            if self.arrays[name].nbytes > MOST_HELD:
                continue
            with suppress(*UNREADABLE):
                self.held[name] = np.asarray(self.arrays[name][:])

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

    def ref(self, block: int, whole: bool = True) -> RefBlock:
        """What the reference said of one block, checked against the ledger. Raises as `pairs` does.

        whole: with each token's logprob, if the cache has them. Without, the digest, which covers them, cannot be checked.
        """
        pairs = self._ledger_row("ledger/pairs", block)
        row = self._ledger_row("ledger/ref", block)
        count, tokens = int(row[1]), int(row[2])
        per_token = self.identity.per_token
        scored = RefBlock(
            self._read("ref/logp_mean", block, count),
            self._read("ref/token_count", block, count),
            self._read("ref/token_logps", block, tokens) if per_token and whole else None,
        )
        known = slice(-1) if per_token and not whole else slice(None)
        if not np.array_equal(ref_row(self.identity, scored, pairs)[known], row[known]):
            raise self._unfitting("ref/", block)
        return scored

    def outline(self, block: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Lengths (n, 3) and source (n, 2) of a block's pairs, without reading their tokens, masks and digests.

        Those are there, of the size that the ledger says, if this does not raise; only `pairs` can tell whether they are sound.

        Raises:
            As `pairs`.
        """
        row = self._ledger_row("ledger/pairs", block)
        pairs, tokens = int(row[1]), int(row[2])
        for name, entries in (("pairs/tokens", tokens), ("pairs/loss_mask", tokens), ("pairs/digest", pairs)):
            for chunk in range(-(-entries // self.specs[name].chunk)):
                self._require_file(name, block, chunk)
        lengths, source = self._read("pairs/lengths", block, pairs), self._read("pairs/source", block, pairs)
        if row[0] != identity_number(self.identity) or lengths.sum() != tokens:
            raise self._unfitting("pairs/", block)
        return lengths, source

    def counted(self, block: int, lengths: NDArray[np.int32]) -> NDArray[np.int32]:
        """(n, 2) counted tokens of a block's pairs, by the mask alone; `lengths` as `outline` gives them. Raises as `pairs`."""
        row = self._ledger_row("ledger/pairs", block)
        mask = self._read("pairs/loss_mask", block, int(row[2]))
        if mask.sum() != row[3]:
            raise self._unfitting("pairs/", block)
        return count_tokens(lengths, mask)

    def block_size(self, block: int) -> tuple[int, int]:
        """Pairs and stored tokens of a block, by the ledger; raises as `pairs` does."""
        _, pairs, tokens, _, _ = self._ledger_row("ledger/pairs", block).tolist()
        return pairs, tokens

    def _ledger_row(self, name: str, block: int) -> NDArray[np.int64]:
        try:
            row = self._values(name, block, len(LEDGER_COLUMNS))
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
            values = self._values(name, block, count)
        except UNREADABLE as error:
            raise self._damaged(name, block, error) from error
        fill = self.arrays[name].fill_value
        if name != "ref/token_logps" and (np.isnan(values) if fill != fill else values == fill).any():
            raise CacheDamaged(f"{self.path}: {name}, block {block}: a chunk is missing")
        return values

    def _values(self, name: str, block: int, count: int) -> np.ndarray:
        source = self.held.get(name, self.arrays[name])
        return np.asarray(source[block, :count])

    def _require_file(self, name: str, block: int, chunk: int) -> None:
        try:
            size = self.place.size(self._chunk_key(name, block, chunk))
        except OSError as error:
            raise self._damaged(name, block, error) from error
        if not size:
            raise CacheDamaged(f"{self.path}: {name}, block {block}: a chunk is empty")

    def _chunk_key(self, name: str, block: int, chunk: int) -> str:
        array = self.arrays[name]
        rest = (0,) * (array.ndim - 2)
        return f"{name}/{array.metadata.encode_chunk_key((block, chunk, *rest))}"

    def _damaged(self, name: str, block: int, error: Exception) -> CacheDamaged:
        return CacheDamaged(
            f"{self.path}: {name}, block {block}: a chunk is damaged ({' '.join(str(error).split())[:120]})"
        )

    def _unfitting(self, group: str, block: int) -> CacheDamaged:
        names = ", ".join(name for name in self.specs if name.startswith(group))
        return CacheDamaged(
            f"{self.path}: one of {names}, block {block}: the data does not fit the ledger's digest (or a chunk is missing)"
        )
