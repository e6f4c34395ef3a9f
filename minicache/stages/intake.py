"""The first half of stage one: rows of preference files -> blocks of encoded pairs in the cache."""

import copy
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from minicache.cache.schema import Source
from minicache.cache.writer import CacheWriter, writing
from minicache.data.encode import Encoder
from minicache.data.formats import read_rows, to_pair
from minicache.data.records import Pair
from minicache.errors import CacheDamaged, DataError, MinicacheError, ModelError, RowRefused
from minicache.pairs import EncodedPair, PairTable
from minicache.trackers import Tracker

REFUSED_FILE = "refused.jsonl"
Refusal = dict[str, str | int]  # file, line, reason, message


def take_in(
    cache: CacheWriter, encoder: Encoder, files: tuple[str, ...], format: str, fail: bool, tracker: Tracker
) -> None:
    """Encode what the cache does not hold yet and write it into free blocks, in the order of files and lines.

    A file that the log knows as complete is not read again, unless a block of pairs is missing or damaged: then the pairs of that
    block are encoded anew. A call that was killed goes on: pairs that are stored already are recognised by digest and source.

    Raises:
        DataError: a file cannot be read, no row became a pair, or (with `fail`) one row was refused. The cache is then as before.
        CacheDamaged: a block is damaged and its pairs are not in these files.
    """
    holes = sorted(cache.unfinished("pairs"))
    before, blocks_before = copy.deepcopy(cache.log), cache.blocks
    numbers = {_register(cache.log.sources, file): file for file in files}
    _check_given(cache, before.sources, numbers, holes)
    todo = {number: file for number, file in numbers.items() if holes or not cache.log.sources[number].complete}
    if not todo:
        return
    tracker.begin("encoding", None)
    cache.write_log()  # from now on a kill leaves a source that is known to be unfinished
    intake = _Intake(cache, holes, fail)
    try:
        for number, file in todo.items():
            intake.read(number, file, encoder, format, tracker)
        intake.finish(set(todo.values()))
    except MinicacheError:
        cache.manifest.log.__dict__.update(before.__dict__)
        cache.shrink(blocks_before)
        cache.write_log()
        raise


def _check_given(cache: CacheWriter, sources: list[Source], given: dict[int, str], holes: list[int]) -> None:
    """A hole can only be filled from the files that were read when it was; so can a file that was not read to its end."""
    needed = [
        source.name for number, source in enumerate(sources) if number not in given and (holes or not source.complete)
    ]
    if needed:
        what = f"pairs of block {holes[0]} are missing or damaged" if holes else "a file was not read to its end"
        raise CacheDamaged(f"{cache.path}: {what}; to go on, add to --data: {', '.join(needed)}")


def _register(sources: list[Source], file: str) -> int:
    """The number of this file's content in the log; a new one gets the next number."""
    with Path(file).open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    for number, source in enumerate(sources):
        if source.sha256 == sha256:
            return number
    sources.append(Source(file, Path(file).stat().st_size, sha256))
    return len(sources) - 1


@dataclass
class _Intake:
    cache: CacheWriter
    holes: list[int]
    fail: bool
    pending: list[EncodedPair] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    seen: dict[bytes, tuple[int, int]] = field(default_factory=dict)  # digest -> where the stored pair came from

    def __post_init__(self) -> None:
        for block in sorted(set(range(self.cache.blocks)) - set(self.holes)):
            table = self.cache.pairs(block)
            digests = table.digest.astype("<u8").tobytes()
            for index, (file, line) in enumerate(table.source.tolist()):
                self.seen[digests[16 * index : 16 * index + 16]] = (file, line)

    def read(self, number: int, file: str, encoder: Encoder, format: str, tracker: Tracker) -> None:
        """Take in one file, from its beginning."""
        source = self.cache.log.sources[number]
        source.rows = source.kept = source.duplicates = source.truncated = 0
        source.refused = {}
        for item in encoder.encode_all(_pairs(file, format), number):
            source.rows += 1
            tracker.advance(1, 0)
            if isinstance(item, RowRefused):
                self._refuse(source, file, item)
                continue
            pair, truncated = item
            known = self.seen.get(pair.digest)
            if known not in (None, pair.source):
                source.duplicates += 1
                continue
            source.kept += 1
            source.truncated += truncated
            if known is None:
                self.seen[pair.digest] = pair.source
                self.pending.append(pair)
                if len(self.pending) == self.cache.identity.block_pairs:
                    self._write_block()
        source.complete = True

    def finish(self, files: set[str]) -> None:
        """Write what is left, check that no hole remains, and close the log."""
        if self.pending:
            self._write_block()
        if self.holes:
            raise CacheDamaged(
                f"{self.cache.path}: pairs of block {self.holes[0]} are damaged and no longer in the files they came from; "
                "precompute into another --ref-cache"
            )
        if not self.seen:
            raise DataError(f"no row became a pair: {self._why()}")
        self._list_refusals(files)
        self.cache.log.blocks, self.cache.log.pairs = self.cache.blocks, len(self.seen)
        self.cache.write_log()

    def _write_block(self) -> None:
        largest, vocabulary = max(int(pair.tokens.max()) for pair in self.pending), self.cache.identity.vocabulary
        if largest >= vocabulary:
            raise ModelError(
                f"the tokenizer gives token id {largest}, the model knows {vocabulary}; "
                "expected the tokenizer the model was trained with (--tokenizer)"
            )
        block = self.holes.pop(0) if self.holes else self.cache.blocks
        self.cache.grow(block + 1)
        self.cache.write_pairs(block, PairTable.from_pairs(self.pending, self.cache.identity.token_dtype))
        self.pending = []

    def _refuse(self, source: Source, file: str, refusal: RowRefused) -> None:
        if self.fail:
            raise DataError(
                f"{file}:{refusal.line}: {refusal.reason}: {refusal} (--on-bad-row skip goes on without it)"
            )
        source.refused[refusal.reason] = source.refused.get(refusal.reason, 0) + 1
        self.refusals.append({"file": file, "line": refusal.line, "reason": refusal.reason, "message": str(refusal)})

    def _why(self) -> str:
        if not self.refusals:
            return "every one of them is in the cache already"
        first = self.refusals[0]
        return f"{len(self.refusals)} refused, the first at {first['file']}:{first['line']}: {first['reason']}: {first['message']}"

    def _list_refusals(self, files: set[str]) -> None:
        """refused.jsonl: the refused rows of every file of the cache, those of `files` as found now."""
        listing = self.cache.path / REFUSED_FILE
        kept: list[Refusal] = []
        if listing.exists():
            lines = listing.read_text(encoding="utf-8").splitlines()
            kept = [row for line in lines if (row := json.loads(line))["file"] not in files]
        with writing(listing):
            draft = listing.with_suffix(".tmp")
            draft.write_text(
                "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in [*kept, *self.refusals]), encoding="utf-8"
            )
            draft.replace(listing)


def _pairs(file: str, format: str) -> Iterator[Pair | RowRefused]:
    for line, row in read_rows(file):
        try:
            if isinstance(row, RowRefused):
                raise row
            yield to_pair(row, file, line, format)
        except RowRefused as refusal:
            refusal.line = line
            yield refusal
