"""The arrays of a cache, opened and checked against their specifications; columns and ledger rows of single blocks.

zarr is read a block at a time and never a row at a time: one slice costs about a millisecond (see docs/cache-format.md).
"""

import logging
import warnings
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BytesCodec, Crc32cCodec, Endian, ZstdCodec

from minicache.cache.manifest import MOST_BLOCKS, Manifest
from minicache.cache.places.opening import place_at
from minicache.cache.places.place import ROOT, Place
from minicache.cache.schema import LEDGER_COLUMNS, ArraySpec, array_specs
from minicache.errors import CacheDamaged, CacheIncomplete
from minicache.options.where import Where

log = logging.getLogger(__name__)

# What zarr raises for bytes that are not those written: checksum, decompression, size, metadata. OSError: the disk itself.
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
MOST_HELD = 2**32  # bytes


class Arrays:
    """The arrays of one cache by name, on disk or in an object store.

    manifest: the cache's identity and log. specs: the specification of each array.
    """

    def __init__(self, where: Where, writable: bool) -> None:
        """Open and check the manifest and every array's metadata.

        Raises:
            CacheNotFound, CacheMismatch (another format version), CacheDamaged, StoreError.
        """
        self.place = place_at(where)
        self.group, self.manifest = _open_group(self.place, writable)
        # Opening a place of the Hub settles its commit.
        self.path = self.place.where
        self.specs = array_specs(self.manifest.identity)
        self.by_name = _open_arrays(self.group, self.specs, self.path)
        self._held: dict[str, np.ndarray] = {}
        digest, pairs = self.manifest.identity.digest, self.manifest.log.pairs
        log.debug("%s opened: %d blocks, %d pairs, identity %s", self.path, self.blocks, pairs, digest)

    @property
    def blocks(self) -> int:
        """The number of blocks that the arrays have room for."""
        return self.by_name["ledger/pairs"].shape[0]

    def hold(self, names: Iterable[str]) -> None:
        """Read these arrays into memory and answer from there: four times as fast as one block after another.

        Later changes are not seen. An array with an unreadable chunk is read block by block, so that the error names the block.
        """
        for name in names:
            if self.by_name[name].nbytes > MOST_HELD:
                continue
            with suppress(*UNREADABLE):
                self._held[name] = np.asarray(self.by_name[name][:])

    def row(self, name: str, block: int) -> NDArray[np.int64]:
        """(5,) the row of a block in one of the two ledgers.

        Raises:
            CacheIncomplete: it was never written. CacheDamaged: it is not as it was written.
        """
        try:
            row = self._values(name, block, len(LEDGER_COLUMNS))
        except UNREADABLE as error:
            raise self._damaged(name, block, error) from error
        if (row == -1).all():
            raise CacheIncomplete(
                f"{self.path}: {name}, block {block} is missing: not finished, or its chunk was deleted"
            )
        most_pairs, most_tokens = self.manifest.identity.block_pairs, self.specs["pairs/tokens"].shape[0]
        if (row[1:4] < 0).any() or row[1] > most_pairs or row[2] > most_tokens:
            raise CacheDamaged(f"{self.path}: {name}, block {block}: impossible sizes {row[1:4].tolist()}")
        return row

    def column(self, name: str, block: int, count: int) -> np.ndarray:
        """(count, …) the first entries of a block in an array. Raises CacheDamaged."""
        try:
            values = self._values(name, block, count)
        except UNREADABLE as error:
            raise self._damaged(name, block, error) from error
        fill = self.by_name[name].fill_value
        if name != "ref/token_logps" and (np.isnan(values) if fill != fill else values == fill).any():
            raise CacheDamaged(f"{self.path}: {name}, block {block}: a chunk is missing")
        return values

    def _values(self, name: str, block: int, count: int) -> np.ndarray:
        source = self._held.get(name, self.by_name[name])
        return np.asarray(source[block, :count])

    def require_chunks(self, name: str, block: int, count: int) -> None:
        """Raises CacheDamaged: a chunk with some of the first `count` entries is missing or empty. Reads none of them."""
        for chunk in range(-(-count // self.specs[name].chunk)):
            try:
                size = self.place.size(self.chunk_key(name, block, chunk))
            except OSError as error:
                raise self._damaged(name, block, error) from error
            if not size:
                raise CacheDamaged(f"{self.path}: {name}, block {block}: a chunk is empty")

    def chunk_key(self, name: str, block: int, chunk: int) -> str:
        """The name of a chunk's file in the cache."""
        array = self.by_name[name]
        rest = (0,) * (array.ndim - 2)
        return f"{name}/{array.metadata.encode_chunk_key((block, chunk, *rest))}"

    def _damaged(self, name: str, block: int, error: Exception) -> CacheDamaged:
        return CacheDamaged(
            f"{self.path}: {name}, block {block}: a chunk is damaged ({' '.join(str(error).split())[:120]})"
        )


def _open_group(place: Place, writable: bool) -> tuple[zarr.Group, Manifest]:
    """The zarr group of a cache, and its manifest.

    Raises:
        CacheNotFound, CacheMismatch (another format version), CacheDamaged, StoreError.
    """
    place.require_cache()
    store = place.store(read_only=not writable)
    try:
        group = zarr.open_group(store, mode="r+" if writable else "r", zarr_format=3, use_consolidated=False)
        attributes = group.attrs.asdict()
    except UNREADABLE as error:
        raise CacheDamaged(f"{place}/{ROOT}: cannot be read as a zarr group: {error}") from error
    return group, Manifest.from_attributes(attributes, str(place))


def _open_arrays(group: zarr.Group, specs: dict[str, ArraySpec], where: object) -> "dict[str, zarr.Array[Any]]":
    """The arrays by name, each with room for as many blocks as the ledger of pairs. Raises CacheDamaged."""
    arrays: dict[str, zarr.Array[Any]] = {}
    # The array that grows last is opened first: the others then have room for its blocks, even if another process adds some.
    for name in sorted(specs, key=lambda name: name != "ledger/pairs"):
        array = arrays[name] = _open_array(group, name, specs[name], f"{where}/{name}")
        found, blocks = array.shape[0], arrays["ledger/pairs"].shape[0]
        if found > MOST_BLOCKS:
            raise CacheDamaged(f"{where}/{name}: expected {MOST_BLOCKS:,} blocks or fewer, found {found}")
        if found < blocks:
            raise CacheDamaged(f"{where}/{name}: expected room for {blocks} blocks, found {found}")
    return arrays


def _open_array(group: zarr.Group, name: str, spec: ArraySpec, where: str) -> "zarr.Array[Any]":
    """One array. Raises CacheDamaged: it is missing, or not as specified."""
    try:
        with warnings.catch_warnings():
            # of codecs that are refused below
            warnings.simplefilter("ignore")
            array = group[name]
    except UNREADABLE as error:
        raise CacheDamaged(f"{where}: the array's zarr.json is missing or damaged: {error}") from error
    if not isinstance(array, zarr.Array):
        raise CacheDamaged(f"{where}: expected an array, found a group")
    found = (array.shape[1:], str(array.dtype), array.chunks, str(array.fill_value))
    expected = (spec.shape, spec.dtype, spec.chunks, str(np.dtype(spec.dtype).type(spec.fill)))
    if found != expected:
        raise CacheDamaged(f"{where}: expected shape, dtype, chunks, fill {expected}, found {found}")
    _require_own_codecs(array, spec, where)
    return array


def _require_own_codecs(array: "zarr.Array[Any]", spec: ArraySpec, where: str) -> None:
    """Raises CacheDamaged: its chunks are not stored as `CacheWriter` stores them. Other codecs know no bounds of their output."""
    metadata: Any = array.metadata
    stored: tuple[Any, ...] = tuple(metadata.codecs)
    expected = [BytesCodec, *([ZstdCodec] if spec.compress else []), Crc32cCodec]
    little = all(each.endian in (None, Endian.little) for each in stored if isinstance(each, BytesCodec))
    if [type(each) for each in stored] != expected or not little:
        found = ", ".join(str(each.to_dict())[:60] for each in stored)
        due = "bytes (little-endian), zstd, crc32c" if spec.compress else "bytes (little-endian), crc32c"
        raise CacheDamaged(f"{where}: expected chunks stored as {due}, found {found}")
    separator = getattr(metadata.chunk_key_encoding, "separator", None)
    if metadata.chunk_key_encoding.name != "default" or separator != "/" or metadata.storage_transformers:
        raise CacheDamaged(f"{where}: expected chunks named like c/0/0, stored as they are; found others")
