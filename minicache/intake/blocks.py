"""The first half of stage one: rows of preference files -> blocks of encoded pairs in the cache.

A block never holds pairs of two files, and files are taken in the order of their numbers. So which pair lies where depends on the
files alone: not on how many calls brought them in, how often one was killed, or what was damaged and made anew.
"""

import copy
import hashlib
import json
from contextlib import closing
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np

from minicache.cache.identity import Identity
from minicache.cache.manifest import Log, Source
from minicache.cache.reader import ReferenceCache
from minicache.cache.refusals import REFUSED_FILE, Refusal, source_of
from minicache.cache.writer import CacheWriter
from minicache.data.encode import Encoder
from minicache.data.files import read_rows
from minicache.data.tokenizers import ChatTokenizer
from minicache.data.workers import RowEncoder
from minicache.errors import (
    CacheDamaged,
    CacheIncomplete,
    CacheMismatch,
    DataError,
    MinicacheError,
    ModelError,
    OutputError,
    RowRefused,
    StoreError,
)
from minicache.pairs import EncodedPair, PairTable
from minicache.trackers import Tracker


def hash_files(files: tuple[str, ...]) -> dict[str, str]:
    """sha256 -> file, each content once."""
    return {_sha256(file): file for file in files}


def encoder_of(identity: Identity, tokenizer: ChatTokenizer) -> Encoder:
    """What makes pairs of rows just as those of a cache of this identity were made."""
    names = (item.name for item in fields(Encoder) if item.name != "tokenizer")
    return Encoder(tokenizer, **{name: getattr(identity, name) for name in names})


def is_taken_in(cache: ReferenceCache, given: dict[str, str], format: str) -> bool:
    """Whether the cache's log knows all these files to their end, and none as unfinished.

    Raises:
        CacheMismatch: a file was read in another format.
    """
    _require_format(cache, given, format)
    known = {source.sha256: source.complete for source in cache.log.sources}
    return all(known.values()) and given.keys() <= known.keys() and cache.blocks == cache.log.blocks


def take_in(
    cache: CacheWriter, encoder: Encoder, given: dict[str, str], format: str, fail: bool, tracker: Tracker
) -> None:
    """Encode what the cache does not hold yet of the files `hash_files` gave and write it into free blocks, in their order.

    A file that the log knows as complete is not read again, unless it may hold the pairs of a damaged block. A call that was killed
    goes on when repeated: pairs that are stored already are recognised by digest and source. If its files are not all given
    again, what it had taken in is dropped; nothing of it was scored.

    Raises:
        DataError: a file cannot be read, no row became a pair, or (with `fail`) one row was refused.
        ModelError: the tokenizer gives ids that the model does not know.
        CacheMismatch: a file was read in another format before.
        CacheDamaged: a block is damaged and its pairs are not in these files.
            After any of these the cache is as before.
        OutputError, StoreError: the disk is full, the object store away. What is written stays, and the same call goes on.
    """
    _require_format(cache, given, format)
    _drop_abandoned(cache, given, tracker)
    before, blocks_before = copy.deepcopy(cache.log), cache.blocks
    numbers = {_register(cache.log.sources, sha256, file, format): file for sha256, file in given.items()}
    stored = _Stored.read(cache)
    needed = _sources_of_holes(cache, before, stored, set(numbers))
    todo = {
        number: numbers[number]
        for number in sorted(numbers)
        if number in needed or not cache.log.sources[number].complete
    }
    if not todo:
        return
    tracker.begin("encoding", None)
    cache.write_log()  # from now on a kill leaves a source that is known to be unfinished
    intake = _Intake(cache, stored.holes, fail, stored.places())
    try:
        for number, file in todo.items():
            intake.read(number, file, encoder, format, tracker)
        intake.finish(set(todo))
    except (OutputError, StoreError):
        raise
    except MinicacheError:
        cache.manifest = replace(cache.manifest, log=before)
        cache.shrink(blocks_before)
        cache.write_log()
        raise


def _sha256(file: str) -> str:
    with Path(file).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _require_format(cache: ReferenceCache, given: dict[str, str], format: str) -> None:
    for source in cache.log.sources:
        if source.sha256 in given and source.format != format:
            raise CacheMismatch(
                f"{cache.path}: {given[source.sha256]} was read with --format {source.format}, asked for {format}. "
                "Ask for the same, or name another --ref-cache"
            )


def _drop_abandoned(cache: CacheWriter, given: dict[str, str], tracker: Tracker) -> None:
    """Take back what an interrupted call has taken in, unless all its files are given again."""
    unread = [source for source in cache.log.sources if not source.complete]
    if missing := [source.name for source in unread if source.sha256 not in given]:
        tracker.note(
            f"reading {', '.join(missing)} was interrupted, and is not asked for now: what came of that call is dropped"
        )
        cache.shrink(cache.log.blocks)
        cache.log.sources = [source for source in cache.log.sources if source.complete]
        cache.write_log()


def _register(sources: list[Source], sha256: str, file: str, format: str) -> int:
    """The number of this file's content in the log; a new one gets the next number."""
    for number, source in enumerate(sources):
        if source.sha256 == sha256:
            return number
    sources.append(Source(file, Path(file).stat().st_size, sha256, format))
    return len(sources) - 1


@dataclass(frozen=True)
class _Stored:
    """What the blocks of pairs hold. blocks: of each sound one, digest (n, 2) and source (n, 2); holes: the others."""

    blocks: dict[int, tuple[np.ndarray, np.ndarray]]
    holes: list[int]

    @classmethod
    def read(cls, cache: CacheWriter) -> "_Stored":
        stored = cls({}, [])
        for block in range(cache.blocks):
            try:
                table = cache.pairs(block)
            except (CacheIncomplete, CacheDamaged):
                stored.holes.append(block)
            else:
                stored.blocks[block] = table.digest, table.source
        return stored

    def file(self, block: int) -> int:
        return int(self.blocks[block][1][0, 0])

    def places(self) -> dict[bytes, tuple[int, int]]:
        """Digest of a pair -> file and line it came from."""
        places = {}
        for digest, source in self.blocks.values():
            keys = digest.astype("<u8").tobytes()
            for index, (file, line) in enumerate(source.tolist()):
                places[keys[16 * index : 16 * index + 16]] = file, line
        return places


def _sources_of_holes(cache: CacheWriter, before: Log, stored: _Stored, given: set[int]) -> set[int]:
    """Files that may hold a hole's pairs: from that of the sound block before it to that of the one after.

    Raises:
        CacheDamaged: not all of them are given.
    """
    needed: set[int] = set()
    for hole in stored.holes:
        if hole >= before.blocks:  # of a call that was interrupted, and whose files are all given
            continue
        first = max((stored.file(block) for block in stored.blocks if block < hole), default=0)
        last = min((stored.file(block) for block in stored.blocks if block > hole), default=len(before.sources) - 1)
        needed |= {number for number in range(first, last + 1) if before.sources[number].kept}
    if absent := sorted(needed - given):
        names = ", ".join(before.sources[number].name for number in absent)
        raise CacheDamaged(
            f"{cache.path}: pairs of block {stored.holes[0]} are missing or damaged; to go on, add to --data: {names}"
        )
    return needed


@dataclass
class _Intake:
    cache: CacheWriter
    holes: list[int]
    fail: bool
    places: dict[bytes, tuple[int, int]]  # digest -> file and line of every stored or pending pair
    pending: list[EncodedPair] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)

    def read(self, number: int, file: str, encoder: Encoder, format: str, tracker: Tracker) -> None:
        """Take in one file, from its beginning."""
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
        log.blocks, log.pairs = self.cache.blocks, len(self.places)
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
        """refused.jsonl: the refused rows of every file of the cache, those of the files `numbers` as found now."""
        place = self.cache.place
        old = (place.read(REFUSED_FILE) or b"").decode(errors="replace").splitlines()
        lines = [line for line in old if source_of(line) not in numbers]
        lines += [json.dumps(row, ensure_ascii=False) for row in self.refusals]
        # what UTF-8 cannot hold is escaped as JSON would
        place.write(REFUSED_FILE, "".join(f"{line}\n" for line in lines).encode(errors="backslashreplace"))
