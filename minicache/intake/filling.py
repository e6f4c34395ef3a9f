"""Rows of preference files -> encoded pairs in the free blocks of a cache; counts of refused and repeated rows."""

import logging
import time
from contextlib import closing
from dataclasses import dataclass, field

from minicache.cache.manifest import Source
from minicache.cache.refusals import Refusal, read_refusals, source_of, write_refusals
from minicache.cache.writer import CacheWriter
from minicache.data.columns import Reading
from minicache.data.encode import Encoded, Encoder
from minicache.data.files import DataFile, read_rows
from minicache.data.sampling import within
from minicache.data.workers import RowEncoder
from minicache.errors import CacheDamaged, DataError, ModelError, RowRefused
from minicache.json_lines import to_json
from minicache.pairs import EncodedPair, PairTable
from minicache.trackers import Tracker

log = logging.getLogger(__name__)


@dataclass
class Filling:
    """Files that are being encoded and written into the free blocks of a cache.

    holes: blocks to fill first. fail: whether a refused row is an error. places: digest -> file and line of every stored or
    pending pair. pending: pairs of the next block.
    """

    cache: CacheWriter
    holes: list[int]
    fail: bool
    places: dict[bytes, tuple[int, int]]
    pending: list[EncodedPair] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)

    def read(self, number: int, file: DataFile, encoder: Encoder, reading: Reading, tracker: Tracker) -> None:
        """Encode a file from its beginning and write its pairs; its last block may be smaller."""
        started, source = time.monotonic(), self.cache.log.sources[number]
        source.rows = source.kept = source.duplicates = source.truncated = 0
        source.refused, source.unused, source.noted, source.example = {}, {}, {}, ""
        line, met = 0, set[bytes]()
        rows = RowEncoder(encoder, file.name, reading, number).encode_by_all_cores(
            within(read_rows(file), source.chosen, reading.sample_seed)
        )
        with closing(rows):
            for item in rows:
                before, line = line, item.line if isinstance(item, RowRefused) else item.pair.source[1]
                if line != before:
                    source.rows += 1
                    tracker.advance(1, 0)
                    met.clear()
                if isinstance(item, RowRefused):
                    self._refuse(number, file.name, item)
                else:
                    self._keep(source, item, met)
                    _count(source, item, is_first=line != before)
        if self.pending:
            self._write_block()
        source.complete = True
        seconds = time.monotonic() - started
        log.debug("%s, %s: %d pairs of %d rows kept, %.1f s", file.name, reading, source.kept, source.rows, seconds)

    def _keep(self, source: Source, item: Encoded, met: set[bytes]) -> None:
        """Count a pair; append it to the next block, unless it is stored already or repeats another.

        met: the digests of the row's pairs before it.
        """
        pair = item.pair
        place = self.places.get(pair.digest)
        if place not in (None, pair.source) or pair.digest in met:
            source.duplicates += 1
            return
        met.add(pair.digest)
        source.kept += 1
        source.truncated += item.truncated
        if place is None:
            self.places[pair.digest] = pair.source
            self.pending.append(pair)
            if len(self.pending) == self.cache.identity.block_pairs:
                self._write_block()

    def finish(self, numbers: set[int]) -> None:
        """Check that the blocks hold exactly the pairs of the files, list the refused rows, and complete the log.

        numbers: of the files that this call has read.
        """
        if not self.places:
            first = self.refusals[0]
            raise DataError(
                f"no row became a pair: {len(self.refusals)} refused, the first at "
                f"{first['file']}:{first['line']}: {first['reason']}: {first['message']}"
            )
        manifest = self.cache.log
        if self.holes or len(self.places) != sum(source.kept for source in manifest.sources):
            raise CacheDamaged(
                f"{self.cache.path}: the files give other pairs than when they were first read (by another version of a "
                "library?); precompute into another --ref-cache"
            )
        self._list_refusals(numbers)
        manifest.blocks, manifest.pairs = len(self.cache.blocks), len(self.places)
        self.cache.write_log()

    def _write_block(self) -> None:
        """Write the pending pairs into the next free block. Raises ModelError: an id is not in the model's vocabulary."""
        largest, vocabulary = max(int(pair.tokens.max()) for pair in self.pending), self.cache.identity.vocabulary
        if largest >= vocabulary:
            raise ModelError(
                f"the tokenizer gives token id {largest}, the model knows 0 to {vocabulary - 1}; "
                "expected the tokenizer the model was trained with (--tokenizer)"
            )
        block = self.holes.pop(0) if self.holes else len(self.cache.blocks)
        self.cache.grow(block + 1)
        self.cache.write_pairs(block, PairTable.from_pairs(self.pending, self.cache.identity.token_dtype))
        self.pending = []

    def _refuse(self, number: int, file: str, refusal: RowRefused) -> None:
        """Count and list a refused row. Raises DataError: refused rows are errors. Nothing is wrong with a tie."""
        if self.fail and refusal.reason != "tie":
            raise DataError(
                f"{file}:{refusal.line}: {refusal.reason}: {refusal} (--on-bad-row skip goes on without it)"
            )
        refused = self.cache.log.sources[number].refused
        refused[refusal.reason] = refused.get(refusal.reason, 0) + 1
        self.refusals.append(
            {"source": number, "file": file, "line": refusal.line, "reason": refusal.reason, "message": str(refusal)}
        )

    def _list_refusals(self, numbers: set[int]) -> None:
        """Write refused.jsonl: this call's refused rows, and those listed before of files that it did not read."""
        place = self.cache.place
        lines = [line.text for line in read_refusals(place) if source_of(line) not in numbers]
        write_refusals(place, lines + [to_json(row) for row in self.refusals])


def _count(source: Source, item: Encoded, is_first: bool) -> None:
    """Count the notes on a row, once for all of its pairs. is_first: whether this is the row's first pair."""
    for kind, detail in item.notes if is_first else ():
        if kind == "unused":
            source.unused[detail] = source.unused.get(detail, 0) + 1
            continue
        source.noted[kind] = source.noted.get(kind, 0) + 1
        if kind == "special-text" and not source.example:
            source.example = f"line {item.pair.source[1]}: {detail}"
