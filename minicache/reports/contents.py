"""The contents of a reference cache as plain numbers, also of an incomplete or damaged one. No torch.

Tokens are read only for single pairs.
"""

import logging
import time
from collections import Counter
from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np

from minicache.cache.reader import ReferenceCache
from minicache.cache.refusals import REFUSED_FILE
from minicache.data.tokenizers import ChatTokenizer
from minicache.errors import CacheError
from minicache.options.others import InspectConfig
from minicache.options.where import Where
from minicache.pairs import CHOSEN, REJECTED, EncodedPair, Ints, PairTable
from minicache.reports.columns import READ, Columns, extreme, pair_lines, read_columns
from minicache.reports.inspection import Inspection, PairView, Segment
from minicache.reports.statistics import histogram, length_statistics, margin_histogram, preference

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReadCache:
    """A cache and its columns, read once for all reports on it.

    without_pairs: the blocks without pairs, unscored: the other blocks without scores, each with the reason.
    """

    cache: ReferenceCache
    columns: Columns
    without_pairs: dict[int, str]
    unscored: dict[int, str]

    @cached_property
    def inspection(self) -> Inspection:
        return _inspection(self)


def read_cache(where: Where) -> ReadCache:
    """Read the ledger, lengths, sources and scores of every block. Missing and damaged blocks are reported, not raised.

    The chunks of tokens, masks and digests must exist but are not read; `verify_cache` and the stages that load them find damage
    there. Only the masks of pairs without scores are read, to count tokens.

    Raises:
        CacheNotFound, CacheMismatch, CacheDamaged: the manifest or an array's metadata cannot be read.
    """
    started, cache = time.monotonic(), ReferenceCache(where)
    cache.blocks.arrays.hold(READ)
    read = ReadCache(cache, *read_columns(cache))
    log.debug("%s: %d blocks read, %.1f s", cache.path, len(cache.blocks), time.monotonic() - started)
    return read


def _inspection(read: ReadCache) -> Inspection:
    cache, columns, without_pairs = read.cache, read.columns, read.without_pairs
    problem = _problem(cache, None if without_pairs else len(columns.lengths))
    unfinished = dict(sorted({**without_pairs, **read.unscored}.items()))
    scored, margins = columns.logp_mean[columns.scored], columns.margins
    refused = sum((Counter(source.refused) for source in cache.log.sources), Counter())
    blocks = max(len(cache.blocks), cache.log.blocks)
    return Inspection(
        path=str(cache.path),
        identity=asdict(cache.identity),
        identity_digest=cache.identity.digest,
        log=asdict(cache.log),
        complete=not unfinished and problem is None,
        problem=problem,
        blocks=blocks,
        blocks_with_pairs=blocks - len(without_pairs),
        blocks_scored=blocks - len(unfinished),
        unfinished={str(block): why for block, why in unfinished.items()},
        shards=cache.log.shards or None,
        shards_missing=sorted({block % cache.log.shards + 1 for block in unfinished}) if cache.log.shards else [],
        pairs=len(columns.lengths),
        pairs_scored=len(scored),
        tokens=int(columns.lengths.sum()),
        counted=[int(total) for total in columns.counted.sum(0)],
        bytes_on_disk=cache.place.total_bytes(),
        lengths=length_statistics(columns) if len(columns.lengths) else {},
        length_histogram=histogram(columns.sides, integers=True),
        logp_histogram=histogram(scored),
        margin_histogram=margin_histogram(margins[columns.scored]),
        reference_prefers_chosen=preference(columns),
        reference_margin=float(np.nanmean(margins)) if len(scored) else None,
        refused=dict(refused),
        refused_rows=refused.total(),
        refused_file=str(cache.place.locate(REFUSED_FILE)) if cache.place.has(REFUSED_FILE) else None,
        truncated=sum(source.truncated for source in cache.log.sources),
        longest=pair_lines(cache, columns, extreme(-columns.sides.max(1, initial=0), 5)),
        highest_margin=pair_lines(cache, columns, extreme(-margins, 3)),
        lowest_margin=pair_lines(cache, columns, extreme(margins, 3)),
        lowest_logp=pair_lines(cache, columns, extreme(columns.logp_mean.min(1, initial=np.inf), 3)),
    )


def inspect_pair(config: InspectConfig) -> PairView:
    """One pair of the cache, decoded with the cache's tokenizer. Raises CacheError."""
    assert config.pair is not None
    cache = ReferenceCache(config.ref_cache)
    tokenizer = ChatTokenizer.load(cache.tokenizer_dir)
    pair, logp_mean = cache.blocks.pair(config.pair)
    table = PairTable.from_pairs([pair], cache.identity.token_dtype)
    scores = np.full((1, 2), np.nan, np.float32) if logp_mean is None else logp_mean[None]
    columns = Columns(
        index=np.array([config.pair]),
        lengths=table.lengths,
        counted=table.token_counts,
        source=table.source,
        logp_mean=scores,
    )
    (line,) = pair_lines(cache, columns, np.array([0]))
    segments = [_segments(tokenizer, pair, side) for side in (CHOSEN, REJECTED)]
    return PairView(line, table.token_counts[0].tolist(), segments)


def _segments(tokenizer: ChatTokenizer, pair: EncodedPair, side: int) -> list[Segment]:
    """A whole side as runs of tokens of one kind, each decoded at once: a character may consist of several tokens."""
    ids, mask = pair.side(side)
    shared = np.arange(len(ids)) < pair.lengths[0]
    starts = np.flatnonzero(np.r_[True, (mask[1:] != mask[:-1]) | (shared[1:] != shared[:-1])])
    segments = []
    for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True):
        text, special = _decoded(tokenizer, ids[start:stop])
        counted = bool(mask[start])
        segments.append(Segment(text=text, counted=counted, shared=bool(shared[start]), special=special))
    return segments


def _decoded(tokenizer: ChatTokenizer, ids: Ints) -> tuple[str, list[list[int]]]:
    """The text of ids, and begin and end of each special token in it."""
    special = tokenizer.are_special(ids)
    starts = np.flatnonzero(np.r_[True, special[1:] | special[:-1]]).tolist()
    text, spans = "", []
    for before, start, stop in zip([0, *starts], starts, [*starts[1:], len(ids)], strict=False):
        begin = len(text)
        text += tokenizer.decode_after(ids[before:stop], start - before)
        if special[start]:
            spans.append([begin, len(text)])
    return text, spans


def _problem(cache: ReferenceCache, pairs: int | None) -> str | None:
    """Why the cache as a whole is not complete, or None. pairs: the number found, None if blocks are known to be missing."""
    try:
        cache.check_complete()
    except CacheError as error:
        return str(error)
    if pairs is not None and pairs != cache.log.pairs:
        return f"{cache.path}: the manifest counts {cache.log.pairs} pairs, the blocks hold {pairs}"
    return None
