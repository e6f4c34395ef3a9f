"""Caches made apart with one identity -> one cache, as if made in one go. No torch; a few blocks in memory at a time."""

from dataclasses import dataclass, replace

import numpy as np

from minicache.cache.manifest import Source, now
from minicache.cache.places.opening import place_at
from minicache.cache.reader import ReferenceCache, require_same
from minicache.intake.merging import choose_pairs, count_pairs, join_sources, read_input, write_merged
from minicache.options.others import MergeConfig
from minicache.options.where import Where
from minicache.trackers import Tracker


@dataclass(frozen=True)
class MergeReport:
    """What a merge did. given: each input and its pairs. pairs: of the new cache. twice: pairs left out, being there already."""

    ref_cache: Where
    given: list[tuple[Where, int]]
    pairs: int
    blocks: int
    twice: int


def merge(config: MergeConfig, tracker: Tracker) -> MergeReport:
    """Write the pairs of all caches into a new one, in the order given; a pair that several have, once.

    The new cache appears complete or not at all.

    Raises:
        CacheMismatch: the caches were made for different requests, or disagree about a pair or a file.
        CacheError: one of them is missing, damaged or not complete. OutputError: `ref_cache` exists or cannot be written.
    """
    out = place_at(config.ref_cache)
    out.require_free(is_new=True)
    caches = [ReferenceCache(path) for path in config.caches]
    for cache in caches:
        require_same(caches[0], cache, "be merged")
        cache.check_complete()
    tracker.begin("comparing", sum(cache.log.pairs for cache in caches))
    sources: list[Source] = []
    inputs = [read_input(cache, join_sources(sources, cache), tracker) for cache in caches]
    kept = choose_pairs(inputs)
    count_pairs(sources, inputs, kept)
    log = replace(caches[0].log, created=now(), sources=sources, pairs=int(sum(map(np.sum, kept))), shards=0)
    tracker.begin("writing", log.pairs)
    blocks = write_merged(out, inputs, kept, log, tracker)
    given = [(cache.path, cache.log.pairs) for cache in caches]
    return MergeReport(out.where, given, log.pairs, blocks, sum(pairs for _, pairs in given) - log.pairs)
