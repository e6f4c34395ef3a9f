"""Pairs of several caches -> the blocks of one."""

import logging
import time
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from minicache.cache.blocks import TOKENIZER
from minicache.cache.complete import each_whole_block
from minicache.cache.identity import TOLERANCE
from minicache.cache.manifest import Log, Manifest, Source
from minicache.cache.places.drafts import drafted
from minicache.cache.places.opening import place_at
from minicache.cache.places.place import Place
from minicache.cache.reader import ReferenceCache
from minicache.cache.refusals import read_refusals, source_of, write_refusals
from minicache.cache.repack import repack, select
from minicache.cache.schema import CachedPairs
from minicache.cache.writer import CacheWriter
from minicache.data.columns import as_typed
from minicache.data.tokenizer_files import copy_tokenizer
from minicache.errors import CacheDamaged, CacheMismatch
from minicache.json_lines import to_json
from minicache.trackers import Tracker

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Input:
    """A cache to merge, and the columns of its N pairs that stay in memory.

    numbers: new number of each of its files. files: (N,) new number of each pair's file. digests: (N, 2) uint64.
    means: (N, 2) float32, nats per token.
    """

    cache: ReferenceCache
    numbers: NDArray[np.int64]
    files: NDArray[np.int64]
    digests: NDArray[np.uint64]
    means: NDArray[np.float32]


def join_sources(sources: list[Source], cache: ReferenceCache) -> NDArray[np.int64]:
    """Add the cache's files to the list, equal contents once; returns the number of each file in the list."""
    known = {source.sha256: number for number, source in enumerate(sources)}
    numbers = []
    for source in cache.log.sources:
        number = known.setdefault(source.sha256, len(sources))
        if number == len(sources):
            sources.append(deepcopy(source))
        elif (before := sources[number].options) != source.options:
            raise CacheMismatch(
                f"{cache.path}: {source.name} was read with {as_typed(source.options)}, in another of the caches with "
                f"{as_typed(before)}; expected the same for each file"
            )
        numbers.append(number)
    return np.array(numbers, np.int64)


# --- which pairs to keep ---


def read_input(cache: ReferenceCache, numbers: NDArray[np.int64], tracker: Tracker) -> Input:
    """Read a cache once; returns its columns. numbers: new numbers of its files. Raises CacheIncomplete, CacheDamaged."""
    started = time.monotonic()
    files, digests, means = [], [], []
    for table, scores in each_whole_block(cache.blocks):
        files.append(numbers[table.source[:, 0]])
        digests.append(table.digest)
        means.append(scores.logp_mean)
        tracker.advance(len(table), 0)
    log.debug("%s: %d pairs read, %.1f s", cache.path, cache.log.pairs, time.monotonic() - started)
    return Input(
        cache=cache,
        numbers=numbers,
        files=np.concatenate(files),
        digests=np.concatenate(digests),
        means=np.concatenate(means),
    )


def choose_pairs(inputs: list[Input]) -> list[NDArray[np.bool_]]:
    """For each cache, an (N,) mask of the pairs that are in no earlier cache. Raises CacheMismatch: two disagree about a pair."""
    original = first_equal(np.concatenate([given.digests for given in inputs]))
    _require_agreement(inputs, original)
    ends = np.cumsum([len(given.files) for given in inputs])
    is_original = original == np.arange(len(original))
    return np.split(is_original, ends[:-1])


def first_equal(rows: NDArray[np.uint64]) -> NDArray[np.int64]:
    """(N,) for each of N rows the index of the first row that equals it."""
    # lexsort is stable: among equal rows the first stays first.
    order = np.lexsort(rows.T)
    ordered = rows[order]
    # Whether a run of equal rows begins here.
    begins = np.append(True, (ordered[1:] != ordered[:-1]).any(1))
    firsts, run = order[begins], np.cumsum(begins) - 1
    result = np.empty(len(rows), np.int64)
    result[order] = firsts[run]
    return result


def _require_agreement(inputs: list[Input], original: NDArray[np.int64]) -> None:
    """Raises CacheMismatch: a repeated pair has other logprobs than the first. original: (N,) as `first_equal` returns it."""
    tolerance = TOLERANCE[inputs[0].cache.identity.dtype]
    means = np.concatenate([given.means for given in inputs])
    differences = np.abs(means - means[original]).max(1)
    if not len(bad := np.flatnonzero(differences > tolerance)):
        return
    ends = np.cumsum([len(given.files) for given in inputs])
    names = []
    for index in (bad[0], original[bad[0]]):
        which = int(np.searchsorted(ends, index, side="right"))
        names.append(f"pair {index - ends[which] + len(inputs[which].files)} of {inputs[which].cache.path}")
    raise CacheMismatch(
        f"{names[0]} is {names[1]}, but their reference logprobs differ by {differences[bad[0]]:.2g} nats per token, as do those "
        f"of {len(bad)} pairs by more than {tolerance:g}. Expected the same values; precompute one of the caches anew"
    )


def count_pairs(sources: list[Source], inputs: list[Input], kept: list[NDArray[np.bool_]]) -> None:
    """Set the counts of the files to the pairs that the new cache keeps. `truncated` stays: it is not stored for each pair.

    Raises:
        CacheMismatch: a file gave other pairs in one cache than in another.
    """
    total = np.zeros(len(sources), np.int64)
    met: set[int] = set()
    for given, is_kept in zip(inputs, kept, strict=True):
        own = np.bincount(given.files[is_kept], minlength=len(sources))
        if differing := met & set(np.flatnonzero(own).tolist()):
            raise CacheMismatch(
                f"{given.cache.path}: {sources[min(differing)].name} gave other pairs there than in the caches before it "
                "(by another version of a library?); precompute one of them anew"
            )
        met |= set(given.numbers.tolist())
        total += own
    for source, pairs in zip(sources, total.tolist(), strict=True):
        source.duplicates += source.kept - pairs
        source.kept = pairs


# --- writing ---


def write_merged(out: Place, inputs: list[Input], kept: list[NDArray[np.bool_]], log: Log, tracker: Tracker) -> int:
    """Write the new cache as a draft and publish it once it is complete. Returns the number of its blocks."""
    first = inputs[0].cache
    if not first.tokenizer_dir.is_dir():
        raise CacheDamaged(f"{first.place.locate(TOKENIZER)}: is missing; run its precompute-ref again, then merge")
    with drafted(out) as draft:
        empty = Manifest(first.identity, replace(log, sources=[], blocks=0, pairs=0))
        cache = CacheWriter.create(draft, empty, lambda tokenizer: copy_tokenizer(first.tokenizer_dir, tokenizer))
        cache.append(repack(_kept_parts(inputs, kept), first.identity.block_pairs), tracker)
        _write_refusals(draft, inputs)
        cache.write_log(replace(log, blocks=len(cache.blocks)))
    return len(cache.blocks)


def _kept_parts(inputs: list[Input], kept: list[NDArray[np.bool_]]) -> Iterator[CachedPairs]:
    """The kept pairs of each block, with the new numbers of their files."""
    for given, all_kept in zip(inputs, kept, strict=True):
        start = 0
        for cached in each_whole_block(given.cache.blocks):
            stop = start + len(cached.table)
            is_kept, start = all_kept[start:stop], stop
            if is_kept.any():
                part = cached if is_kept.all() else select(cached, is_kept)
                file, line = part.table.source.T
                source = np.stack([given.numbers[file], line], axis=1)
                yield CachedPairs(replace(part.table, source=source), part.reference)


def _write_refusals(draft: Path, inputs: list[Input]) -> None:
    """Write refused.jsonl: for each file the rows that the first cache with this file lists, under its new number."""
    lines: list[str] = []
    met: set[int] = set()
    for given in inputs:
        numbers: dict[int | None, int] = dict(enumerate(given.numbers.tolist()))
        for line in read_refusals(given.cache.place):
            if (number := numbers.get(source_of(line), -1)) not in (-1, *met):
                lines.append(to_json({**line.value, "source": number}))
        met |= set(numbers.values())
    write_refusals(place_at(draft), lines)
