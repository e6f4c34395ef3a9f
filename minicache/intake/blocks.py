"""The first half of stage one: rows of preference files -> blocks of encoded pairs in the cache.

A block never holds pairs of two files, and files are read in the order of their numbers. So the place of a pair depends on the
files alone: not on the number of calls, on kills, or on blocks that were damaged and rewritten.
"""

import copy
import hashlib
import logging
from dataclasses import fields, replace

from minicache.cache.blocks import Blocks
from minicache.cache.identity import Identity
from minicache.cache.manifest import Source
from minicache.cache.writer import CacheWriter
from minicache.data.columns import Reading, as_typed
from minicache.data.encode import Encoder
from minicache.data.files import DataFile
from minicache.data.sampling import bounds
from minicache.data.tokenizers import ChatTokenizer
from minicache.errors import CacheMismatch, MinicacheError, OutputError, StoreError
from minicache.intake.filling import Filling
from minicache.intake.stored import Stored, sources_of_holes
from minicache.trackers import Tracker

log = logging.getLogger(__name__)


def hash_files(files: list[DataFile]) -> dict[str, DataFile]:
    """The files by their sha256; files with equal content count once."""
    return {_sha256(file): file for file in files}


def encoder_of(identity: Identity, tokenizer: ChatTokenizer) -> Encoder:
    """The encoder that makes pairs with the options of this identity."""
    names = (item.name for item in fields(Encoder) if item.name != "tokenizer")
    tokenizer = replace(tokenizer, date=identity.date, arguments=identity.template_args)
    return Encoder(tokenizer=tokenizer, **{name: getattr(identity, name) for name in names})


def holds_all(blocks: Blocks, given: dict[str, DataFile], reading: Reading) -> bool:
    """Whether, by the cache's log, all these files were read to their end and no other file is unfinished.

    Raises:
        CacheMismatch: a file was read with other options.
    """
    _require_reading(blocks, given, reading)
    known = {source.sha256: source.complete for source in blocks.log.sources}
    return all(known.values()) and given.keys() <= known.keys() and len(blocks) == blocks.log.blocks


def take_in(
    cache: CacheWriter, encoder: Encoder, given: dict[str, DataFile], reading: Reading, fail: bool, tracker: Tracker
) -> None:
    """Encode the pairs that the cache does not hold yet and write them into free blocks, in the order of the files.

    given: the files as `hash_files` returns them. A file that is complete by the log is read again only if it may hold the pairs
    of a damaged block. A killed call resumes when it is repeated: stored pairs are recognised by digest and source. If not all of
    its files are given again, its stored pairs are dropped; none of them was scored.

    Raises:
        DataError: a file cannot be read, no row became a pair, or (with `fail`) a row was refused.
        ModelError: the tokenizer gives ids that the model does not know.
        CacheMismatch: a file was read with other options before.
        CacheDamaged: a block is damaged and its pairs are not in these files.
            After any of these the cache is as before.
        OutputError, StoreError: the disk is full, the object store cannot be reached. What is written stays, and the same call
            resumes.
    """
    _require_reading(cache.blocks, given, reading)
    _drop_abandoned(cache, given, tracker)
    before, blocks_before = copy.deepcopy(cache.log), len(cache.blocks)
    numbers = _register(cache.log.sources, given, reading)
    stored = Stored.read(cache.blocks)
    needed = sources_of_holes(cache.blocks, before, stored, set(numbers))
    todo = sorted(number for number in numbers if number in needed or not cache.log.sources[number].complete)
    if not todo:
        return
    tracker.begin("encoding", None)
    # From now on a kill leaves sources in the log that are known to be unfinished.
    cache.write_log()
    filling = Filling(cache=cache, holes=stored.holes, fail=fail, places=stored.places())
    try:
        for number in todo:
            filling.read(number, numbers[number], encoder, reading, tracker)
        filling.finish(set(todo))
    except (OutputError, StoreError):
        raise
    except MinicacheError:
        cache.shrink(blocks_before)
        cache.write_log(before)
        raise


def _sha256(file: DataFile) -> str:
    """The digest of a file's content."""
    with file.path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _require_reading(blocks: Blocks, given: dict[str, DataFile], reading: Reading) -> None:
    """Raises CacheMismatch: the cache read one of the files with other options."""
    for source in blocks.log.sources:
        if source.sha256 in given and source.options != reading.options:
            raise CacheMismatch(
                f"{blocks.path}: {given[source.sha256].name} was read with {as_typed(source.options)}, asked for "
                f"{as_typed(reading.options)}. "
                "Ask for the same, or name another --ref-cache"
            )


def _drop_abandoned(cache: CacheWriter, given: dict[str, DataFile], tracker: Tracker) -> None:
    """Drop the pairs of an interrupted call, unless all files of that call are given again."""
    unread = [source for source in cache.log.sources if not source.complete]
    if missing := [source.name for source in unread if source.sha256 not in given]:
        tracker.note(
            f"reading {', '.join(missing)} was interrupted, and it is not in --data now: the pairs of that call are dropped"
        )
        cache.shrink(cache.log.blocks)
        cache.log.sources = [source for source in cache.log.sources if source.complete]
        cache.write_log()


def _register(sources: list[Source], given: dict[str, DataFile], reading: Reading) -> dict[int, DataFile]:
    """The files by their number in the log; a new content gets the next number."""
    known = {source.sha256: number for number, source in enumerate(sources)}
    new = {sha256: file for sha256, file in given.items() if sha256 not in known}
    # Of all files: those that are known keep what they chose before.
    chosen = dict(zip(given, bounds(list(given.values()), reading), strict=True)) if new else {}
    for sha256, file in new.items():
        known[sha256] = len(sources)
        sources.append(
            Source(
                name=file.name,
                size=file.path.stat().st_size,
                sha256=sha256,
                format=reading.format,
                reading=reading.others,
                chosen=chosen[sha256],
            )
        )
    return {known[sha256]: file for sha256, file in given.items()}
