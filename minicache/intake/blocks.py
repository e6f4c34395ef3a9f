"""The first half of stage one: rows of preference files -> blocks of encoded pairs in the cache.

A block never holds pairs of two files, and files are read in the order of their numbers. So the place of a pair depends on the
files alone: not on the number of calls, on kills, or on what was damaged and made anew.
"""

import copy
import hashlib
from dataclasses import fields
from pathlib import Path

from minicache.cache.blocks import Blocks
from minicache.cache.identity import Identity
from minicache.cache.manifest import Source
from minicache.cache.writer import CacheWriter
from minicache.data.encode import Encoder
from minicache.data.tokenizers import ChatTokenizer
from minicache.errors import CacheMismatch, MinicacheError, OutputError, StoreError
from minicache.intake.filling import Filling
from minicache.intake.stored import Stored, sources_of_holes
from minicache.trackers import Tracker


def hash_files(files: tuple[str, ...]) -> dict[str, str]:
    """sha256 -> file, each content once."""
    return {_sha256(file): file for file in files}


def encoder_of(identity: Identity, tokenizer: ChatTokenizer) -> Encoder:
    """An encoder that makes pairs as those of a cache of this identity were made."""
    names = (item.name for item in fields(Encoder) if item.name != "tokenizer")
    return Encoder(tokenizer, **{name: getattr(identity, name) for name in names})


def holds_all(blocks: Blocks, given: dict[str, str], format: str) -> bool:
    """Whether the cache holds all these files to their end, by its log, and no file that is unfinished.

    Raises:
        CacheMismatch: a file was read in another format.
    """
    _require_format(blocks, given, format)
    known = {source.sha256: source.complete for source in blocks.log.sources}
    return all(known.values()) and given.keys() <= known.keys() and len(blocks) == blocks.log.blocks


def take_in(
    cache: CacheWriter, encoder: Encoder, given: dict[str, str], format: str, fail: bool, tracker: Tracker
) -> None:
    """Encode what the cache does not hold yet of the files `hash_files` gave and write it into free blocks, in their order.

    A file that is complete by the log is not read again, unless it may hold the pairs of a damaged block. A killed call goes on
    when it is repeated: stored pairs are recognised by digest and source. If not all of its files are given again, what it had
    stored is dropped; nothing of it was scored.

    Raises:
        DataError: a file cannot be read, no row became a pair, or (with `fail`) one row was refused.
        ModelError: the tokenizer gives ids that the model does not know.
        CacheMismatch: a file was read in another format before.
        CacheDamaged: a block is damaged and its pairs are not in these files.
            After any of these the cache is as before.
        OutputError, StoreError: the disk is full, the object store away. What is written stays, and the same call goes on.
    """
    _require_format(cache.blocks, given, format)
    _drop_abandoned(cache, given, tracker)
    before, blocks_before = copy.deepcopy(cache.log), len(cache.blocks)
    numbers = {_register(cache.log.sources, sha256, file, format): file for sha256, file in given.items()}
    stored = Stored.read(cache.blocks)
    needed = sources_of_holes(cache.blocks, before, stored, set(numbers))
    todo = sorted(number for number in numbers if number in needed or not cache.log.sources[number].complete)
    if not todo:
        return
    tracker.begin("encoding", None)
    cache.write_log()  # from now on a kill leaves a source that is known to be unfinished
    filling = Filling(cache, stored.holes, fail, stored.places())
    try:
        for number in todo:
            filling.read(number, numbers[number], encoder, format, tracker)
        filling.finish(set(todo))
    except (OutputError, StoreError):
        raise
    except MinicacheError:
        cache.shrink(blocks_before)
        cache.write_log(before)
        raise


def _sha256(file: str) -> str:
    with Path(file).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _require_format(blocks: Blocks, given: dict[str, str], format: str) -> None:
    for source in blocks.log.sources:
        if source.sha256 in given and source.format != format:
            raise CacheMismatch(
                f"{blocks.path}: {given[source.sha256]} was read with --format {source.format}, asked for {format}. "
                "Ask for the same, or name another --ref-cache"
            )


def _drop_abandoned(cache: CacheWriter, given: dict[str, str], tracker: Tracker) -> None:
    """Drop what an interrupted call has stored, unless all files of that call are given again."""
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
