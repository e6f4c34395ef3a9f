"""Rows of preference files -> encoded pairs in the free blocks of a cache, and what was refused or met twice."""

import json
from contextlib import closing
from dataclasses import dataclass, field

from minicache.cache.manifest import Source
from minicache.cache.refusals import Refusal, read_refusals, source_of, write_refusals
from minicache.cache.writer import CacheWriter
from minicache.data.encode import Encoder
from minicache.data.files import read_rows
from minicache.data.workers import RowEncoder
from minicache.errors import CacheDamaged, DataError, ModelError, RowRefused
from minicache.pairs import EncodedPair, PairTable
from minicache.trackers import Tracker


@dataclass
class Filling:
    """Files being encoded and written into the free blocks of a cache.

    holes: blocks to fill first. fail: whether a refused row ends it. places: digest -> file and line of every stored or pending
    pair. pending: pairs of the block to come.
    """

    cache: CacheWriter
    holes: list[int]
    fail: bool
    places: dict[bytes, tuple[int, int]]
    pending: list[EncodedPair] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)

    def read(self, number: int, file: str, encoder: Encoder, format: str, tracker: Tracker) -> None:
        """Encode one file from its beginning and write its pairs; the last of its blocks may be smaller."""
        source = self.cache.log.sources[number]
        source.rows = source.kept = source.duplicates = source.truncated = 0
        source.refused = {}
        rows = RowEncoder(encoder, file, format, number).encode_by_all_cores(read_rows(file))
        with closing(rows):
            for item in rows:
                source.rows += 1
                tracker.advance(1, 0)
                if isinstance(item, RowRefused):
                    self._refuse(number, file, item)
                else:
                    self._keep(source, *item)
        if self.pending:
            self._write_block()
        source.complete = True

    def _keep(self, source: Source, pair: EncodedPair, truncated: bool) -> None:
        place = self.places.get(pair.digest)
        if place not in (None, pair.source):
            source.duplicates += 1
            return
        source.kept += 1
        source.truncated += truncated
        if place is None:
            self.places[pair.digest] = pair.source
            self.pending.append(pair)
            if len(self.pending) == self.cache.identity.block_pairs:
                self._write_block()

    def finish(self, numbers: set[int]) -> None:
        """Check that the blocks hold just what the files give, list what was refused, and close the log."""
        log = self.cache.log
        if not self.places:
            first = self.refusals[0]
            raise DataError(
                f"no row became a pair: {len(self.refusals)} refused, the first at "
                f"{first['file']}:{first['line']}: {first['reason']}: {first['message']}"
            )
        if self.holes or len(self.places) != sum(source.kept for source in log.sources):
            raise CacheDamaged(
                f"{self.cache.path}: the files give other pairs than when they were first read (by another version of a "
                "library?); precompute into another --ref-cache"
            )
        self._list_refusals(numbers)
        log.blocks, log.pairs = len(self.cache.blocks), len(self.places)
        self.cache.write_log()

    def _write_block(self) -> None:
        largest, vocabulary = max(int(pair.tokens.max()) for pair in self.pending), self.cache.identity.vocabulary
        if largest >= vocabulary:
            raise ModelError(
                f"the tokenizer gives token id {largest}, the model knows {vocabulary}; "
                "expected the tokenizer the model was trained with (--tokenizer)"
            )
        block = self.holes.pop(0) if self.holes else len(self.cache.blocks)
        self.cache.grow(block + 1)
        self.cache.write_pairs(block, PairTable.from_pairs(self.pending, self.cache.identity.token_dtype))
        self.pending = []

    def _refuse(self, number: int, file: str, refusal: RowRefused) -> None:
        if self.fail:
            raise DataError(
                f"{file}:{refusal.line}: {refusal.reason}: {refusal} (--on-bad-row skip goes on without it)"
            )
        refused = self.cache.log.sources[number].refused
        refused[refusal.reason] = refused.get(refusal.reason, 0) + 1
        self.refusals.append(
            {"source": number, "file": file, "line": refusal.line, "reason": refusal.reason, "message": str(refusal)}
        )

    def _list_refusals(self, numbers: set[int]) -> None:
        """Write refused.jsonl: the refused rows of every file of the cache; those of the files `numbers` are this call's."""
        place = self.cache.place
        lines = [line.text for line in read_refusals(place) if source_of(line) not in numbers]
        write_refusals(place, lines + [json.dumps(row, ensure_ascii=False) for row in self.refusals])
