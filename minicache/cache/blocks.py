"""Reading a reference cache block by block. Missing and damaged blocks raise errors."""

from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from minicache.cache.arrays import Arrays
from minicache.cache.identity import Identity
from minicache.cache.manifest import Log, Manifest
from minicache.cache.places.place import Place
from minicache.cache.schema import CachedPairs, RefBlock, identity_number, pairs_row, ref_row
from minicache.errors import CacheDamaged, CacheError, CacheIncomplete
from minicache.options.where import Where
from minicache.pairs import EncodedPair, PairTable, count_tokens

TOKENIZER = "tokenizer"
Found = TypeVar("Found")


class Blocks:
    """The blocks of one cache, on disk or in an object store; their number is `len`, scored or not."""

    def __init__(self, where: Where, writable: bool = False) -> None:
        """Open the cache. Raises CacheNotFound, CacheMismatch (another format version), CacheDamaged, StoreError."""
        self.arrays = Arrays(where, writable)
        self.place, self.path = self.arrays.place, self.arrays.path

    @property
    def manifest(self) -> Manifest:
        return self.arrays.manifest

    @property
    def identity(self) -> Identity:
        return self.manifest.identity

    @property
    def log(self) -> Log:
        return self.manifest.log

    def __len__(self) -> int:
        return self.arrays.blocks

    @cached_property
    def tokenizer_dir(self) -> Path:
        """The directory with the tokenizer's files. It may be a copy: use `place.put_folder` to change them.

        Raises:
            CacheDamaged: it contains a link or a device.
        """
        folder = self.place.folder(TOKENIZER)
        for file in [folder] if folder.is_symlink() else folder.rglob("*"):
            if file.is_symlink() or not (file.is_file() or file.is_dir()):
                raise CacheDamaged(
                    f"{file}: expected a file; run the same precompute-ref again to write the tokenizer anew"
                )
        return folder

    # --- block after block ---

    def each(
        self, read: Callable[[int], Found], among: Iterable[int] | None = None
    ) -> Iterator[tuple[int, Found | CacheError]]:
        """The number of each block (or of those in `among`), with the result of `read` or the error of a bad block."""
        for block in range(len(self)) if among is None else among:
            found: Found | CacheError
            try:
                found = read(block)
            except (CacheIncomplete, CacheDamaged) as error:
                found = error
            yield block, found

    def unscored(self) -> list[int]:
        """The blocks whose scores are missing or damaged."""
        return [block for block, found in self.each(self.ref) if isinstance(found, CacheError)]

    def spans(self) -> Iterator[tuple[int, range]]:
        """Each block and the positions of its pairs in the cache. Ends at a block of unknown size: later positions are unknown."""
        first = 0
        for block, size in self.each(self.size):
            if isinstance(size, CacheError):
                return
            yield block, range(first, first + size[0])
            first += size[0]

    def pair(self, index: int) -> tuple[EncodedPair, NDArray[np.float32] | None]:
        """One pair by its position in the cache, and its (2,) mean logprobs if it is scored.

        Raises:
            CacheError: there is no such pair, or its block cannot be read.
        """
        number, end = 0, 0
        for block, span in self.spans():
            if index in span:
                within = index - span.start
                try:
                    means = self.ref(block).logp_mean[within]
                except CacheIncomplete:
                    means = None
                return self.pairs(block)[within], means
            number, end = block + 1, span.stop
        if number < len(self):
            # Raises the error of the block where the positions end.
            self.size(number)
        raise CacheError(f"{self.path}: there is no pair {index}; the cache holds {end}, numbered from 0")

    def telling_pairs(self) -> PairTable:
        """The pairs of block 0 and those of the block with the longest side: what a choice for the whole cache is made by.

        Raises:
            As `pairs`.
        """
        found = dict(self.each(self._longest_side))
        longest = {block: side for block, side in found.items() if not isinstance(side, CacheError)}
        block = max(longest, key=longest.__getitem__, default=0)
        return PairTable.concatenate([self.pairs(each) for each in sorted({0, block})])

    # --- one block ---

    def whole(self, block: int) -> CachedPairs:
        """The pairs of a block and their scores. Raises as `pairs`."""
        found = CachedPairs(self.pairs(block), self.ref(block))
        if problem := self.disagreement(block, found):
            raise problem
        return found

    def disagreement(self, block: int, found: CachedPairs) -> CacheDamaged | None:
        """The error of a block whose scores are not of its pairs, though each fits its ledger; None: they may be."""
        if np.array_equal(found.table.token_counts, found.reference.token_count):
            return None
        return self._impossible(block, "as many tokens in ref/token_count as count by the mask")

    def pairs(self, block: int) -> PairTable:
        """The pairs of a block, checked against the ledger.

        Raises:
            CacheIncomplete: they were never written. CacheDamaged: they are not as they were written.
        """
        row = self.arrays.row("ledger/pairs", block)
        pairs, tokens = int(row[1]), int(row[2])
        table = PairTable(
            tokens=self.arrays.column("pairs/tokens", block, tokens),
            loss_mask=self.arrays.column("pairs/loss_mask", block, tokens),
            lengths=self.arrays.column("pairs/lengths", block, pairs),
            digest=self.arrays.column("pairs/digest", block, pairs),
            source=self.arrays.column("pairs/source", block, pairs),
        )
        if not np.array_equal(pairs_row(self.identity, table), row):
            raise self._unfitting("pairs/", block)
        self._require_possible(table.lengths, table.source, tokens, block)
        ids, mask = table.tokens, table.loss_mask
        if tokens and (ids.min() < 0 or ids.max() >= self.identity.vocabulary or mask.max() > 1):
            raise self._impossible(block, f"ids from 0 to {self.identity.vocabulary - 1} and a mask of 0 and 1")
        return table

    def ref(self, block: int, whole: bool = True) -> RefBlock:
        """The scores of a block, checked against the ledger. Raises as `pairs`.

        whole: read each token's logprob too, if the cache has them. Without them their digest cannot be checked.
        """
        pairs = self.arrays.row("ledger/pairs", block)
        row = self.arrays.row("ledger/ref", block)
        count, tokens = int(row[1]), int(row[2])
        per_token = self.identity.per_token
        scored = RefBlock(
            self.arrays.column("ref/logp_mean", block, count),
            self.arrays.column("ref/token_count", block, count),
            self.arrays.column("ref/token_logps", block, tokens) if per_token and whole else None,
        )
        known = slice(-1) if per_token and not whole else slice(None)
        if not np.array_equal(ref_row(self.identity, scored, pairs)[known], row[known]):
            raise self._unfitting("ref/", block)
        if not np.isfinite(scored.logp_mean).all() or (scored.token_count < 1).any():
            raise self._impossible(block, "finite logprobs, of at least one token a side")
        return scored

    def outline(self, block: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Lengths (n, 3) and source (n, 2) of a block's pairs, without reading their tokens, masks and digests.

        It checks that the chunks of those exist; only `pairs` finds out whether they are sound.

        Raises:
            As `pairs`.
        """
        row = self.arrays.row("ledger/pairs", block)
        pairs, tokens = int(row[1]), int(row[2])
        for name, entries in (("pairs/tokens", tokens), ("pairs/loss_mask", tokens), ("pairs/digest", pairs)):
            self.arrays.require_chunks(name, block, entries)
        lengths, source = (
            self.arrays.column("pairs/lengths", block, pairs),
            self.arrays.column("pairs/source", block, pairs),
        )
        if row[0] != identity_number(self.identity) or lengths.sum() != tokens:
            raise self._unfitting("pairs/", block)
        self._require_possible(lengths, source, tokens, block)
        return lengths, source

    def counted(self, block: int, lengths: NDArray[np.int32]) -> NDArray[np.int32]:
        """(n, 2) counted tokens of a block's pairs, by the mask alone. lengths: as from `outline`. Raises as `pairs`."""
        row = self.arrays.row("ledger/pairs", block)
        mask = self.arrays.column("pairs/loss_mask", block, int(row[2]))
        if mask.sum() != row[3]:
            raise self._unfitting("pairs/", block)
        return count_tokens(lengths, mask)

    def digests(self, block: int) -> NDArray[np.uint64]:
        """(n, 2) digests of a block's pairs as stored, without a check against the ledger. Raises as `pairs`."""
        return self.arrays.column("pairs/digest", block, self.size(block)[0])

    def size(self, block: int) -> tuple[int, int]:
        """The numbers of pairs and stored tokens of a block, by the ledger. Raises as `pairs`."""
        _, pairs, tokens, _, _ = self.arrays.row("ledger/pairs", block).tolist()
        return pairs, tokens

    def _longest_side(self, block: int) -> int:
        """Tokens of the longest side of a block's pairs, by their lengths alone. Raises as `pairs`."""
        lengths = self.arrays.column("pairs/lengths", block, self.size(block)[0])
        return int((lengths[:, 0] + lengths[:, 1:].max(1)).max())

    def _require_possible(self, lengths: NDArray[np.int32], source: NDArray[np.int64], tokens: int, block: int) -> None:
        """Raises CacheDamaged: no pairs of this cache could have these, whatever its ledger says: a stranger may have made both."""
        wide, most, files = lengths.astype(np.int64), self.identity.max_length, len(self.log.sources)
        sides = wide[:, :1] + wide[:, 1:]
        if wide.sum() != tokens or (wide < (0, 1, 1)).any() or (sides > most).any():
            raise self._impossible(block, f"pairs of {tokens} tokens in all, and of 1 to {most} on each side")
        if ((source[:, 0] < 0) | (source[:, 0] >= files)).any():
            raise self._impossible(block, f"pairs of the {files} files in the log")

    def _impossible(self, block: int, expected: str) -> CacheDamaged:
        return CacheDamaged(
            f"{self.path}: block {block} holds what no run of precompute-ref writes; expected {expected}"
        )

    def _unfitting(self, group: str, block: int) -> CacheDamaged:
        names = ", ".join(name for name in self.arrays.specs if name.startswith(group))
        return CacheDamaged(
            f"{self.path}: one of {names}, block {block}: the data does not fit the ledger's digest (or a chunk is missing)"
        )


class OpenCache:
    """A cache that is open, for reading or writing. blocks: its blocks."""

    blocks: Blocks

    @property
    def path(self) -> Where:
        return self.blocks.path

    @property
    def place(self) -> Place:
        return self.blocks.place

    @property
    def identity(self) -> Identity:
        return self.blocks.identity

    @property
    def log(self) -> Log:
        return self.blocks.log
