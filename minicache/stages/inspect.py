"""What is in a reference cache, as plain numbers: complete or not, damaged or not. No torch.

Tokens are not read, unless one pair is asked for or everything is to be verified.
"""

import math
from collections import Counter
from dataclasses import asdict

import numpy as np

from minicache.cache.reader import ReferenceCache
from minicache.config import InspectConfig
from minicache.data.tokenizers import ChatTokenizer
from minicache.errors import CacheError
from minicache.inspection import Histogram, Inspection, MarginHistogram, PairView, Segment
from minicache.pairs import CHOSEN, REJECTED, EncodedPair, PairTable
from minicache.stages.columns import READ, Columns, extreme, pair_lines, read_columns
from minicache.stages.intake import REFUSED_FILE

BINS = 16
SIDES = ("chosen", "rejected")


def inspect_cache(config: InspectConfig) -> Inspection:
    """Read the ledger, lengths, sources and scores of every block; a missing or damaged one is reported, not raised.

    Tokens, masks and digests must be there, but are not read; damage inside them is found by `verify_cache`, and by all that
    loads them. Only the masks of pairs without scores are read, to count.

    Raises:
        CacheNotFound, CacheMismatch, CacheDamaged: only if the manifest or an array's metadata cannot be read.
    """
    cache = ReferenceCache(config.ref_cache)
    cache.hold(READ)
    columns, without_pairs, unscored = read_columns(cache)
    problem = _problem(cache, None if without_pairs else len(columns.lengths))
    unfinished = dict(sorted({**without_pairs, **unscored}.items()))
    scored = columns.logp_mean[columns.scored]
    margins = np.where(columns.scored, columns.logp_mean[:, CHOSEN] - columns.logp_mean[:, REJECTED], np.nan)
    sources = cache.log.sources
    refused = sum((Counter(source.refused) for source in sources), Counter())
    blocks = max(cache.blocks, cache.log.blocks)
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
        lengths=_length_statistics(columns) if len(columns.lengths) else {},
        length_histogram=_histogram(columns.sides, integers=True),
        logp_histogram=_histogram(scored),
        margin_histogram=_margin_histogram(margins[columns.scored]),
        reference_prefers_chosen=_preference(columns),
        reference_margin=float(np.nanmean(margins)) if len(scored) else None,
        refused=dict(refused),
        refused_rows=refused.total(),
        refused_file=str(cache.place.locate(REFUSED_FILE)) if cache.place.has(REFUSED_FILE) else None,
        truncated=sum(source.truncated for source in sources),
        longest=pair_lines(cache, columns, extreme(-columns.sides.max(1, initial=0), 5)),
        highest_margin=pair_lines(cache, columns, extreme(-margins, 3)),
        lowest_margin=pair_lines(cache, columns, extreme(margins, 3)),
        lowest_logp=pair_lines(cache, columns, extreme(columns.logp_mean.min(1, initial=np.inf), 3)),
    )


def verify_cache(config: InspectConfig) -> list[str]:
    """Re-read everything and check every digest; one line a problem."""
    return [str(problem) for _, problem in ReferenceCache(config.ref_cache).verify()]


def inspect_pair(config: InspectConfig) -> PairView:
    """One pair of the cache, decoded with the tokenizer that lies in it. Raises CacheError."""
    assert config.pair is not None
    cache = ReferenceCache(config.ref_cache)
    tokenizer = ChatTokenizer.load(cache.tokenizer_dir)
    pair, logp_mean = cache.pair(config.pair)
    table = PairTable.from_pairs([pair], cache.identity.token_dtype)
    scores = np.full((1, 2), np.nan, np.float32) if logp_mean is None else logp_mean[None]
    columns = Columns(np.array([config.pair]), table.lengths, table.token_counts, table.source, scores)
    (line,) = pair_lines(cache, columns, np.array([0]))
    segments = [_segments(tokenizer, pair, side) for side in (CHOSEN, REJECTED)]
    return PairView(line, table.token_counts[0].tolist(), segments)


def _segments(tokenizer: ChatTokenizer, pair: EncodedPair, side: int) -> list[Segment]:
    """One whole side in runs of tokens of one kind: a character of several tokens is decoded from all of them."""
    ids, mask = pair.side(side)
    shared = np.arange(len(ids)) < pair.lengths[0]
    starts = np.flatnonzero(np.r_[True, (mask[1:] != mask[:-1]) | (shared[1:] != shared[:-1])])
    parts = zip(starts, [*starts[1:], len(ids)], strict=True)
    return [Segment(tokenizer.decode(ids[a:b]), bool(mask[a]), bool(shared[a])) for a, b in parts]


def _problem(cache: ReferenceCache, pairs: int | None) -> str | None:
    """What keeps the cache as a whole from being complete. pairs: how many there are, None if blocks are known to lack."""
    try:
        cache.check_complete()
    except CacheError as error:
        return str(error)
    if pairs is not None and pairs != cache.log.pairs:
        return f"{cache.path}: the manifest counts {cache.log.pairs} pairs, the blocks hold {pairs}"
    return None


def _length_statistics(columns: Columns) -> dict[str, dict[str, float]]:
    values = {"prefix": columns.lengths[:, 0]}
    for side, name in enumerate(SIDES):
        values[name] = columns.sides[:, side]
        values[f"{name}_counted"] = columns.counted[:, side]
    return {
        name: {
            "min": int(column.min()),
            "median": float(np.median(column)),
            "mean": float(column.mean()),
            "p95": float(np.percentile(column, 95)),
            "max": int(column.max()),
        }
        for name, column in values.items()
    }


def _histogram(values: np.ndarray, integers: bool = False) -> Histogram | None:
    """values: (N, 2), chosen and rejected. None if there are none."""
    if not len(values):
        return None
    low, high = float(values.min()), float(values.max())
    if integers:  # bins of whole numbers: none is empty only because of where its bounds fall
        width = max(1, -(-int(high - low + 1) // BINS))
        edges = np.arange(low, low + width * (int(high - low) // width + 1) + 1, width) - 0.5
    else:
        edges = np.linspace(low, high if high > low else low + 1, BINS + 1)
    counts = [np.histogram(values[:, side], edges)[0].tolist() for side in (0, 1)]
    return Histogram(edges.tolist(), *counts)


def _margin_histogram(margins: np.ndarray) -> MarginHistogram | None:
    """margins: (N,) nats a token. Bounds are multiples of a width, so that no bin holds pairs from both sides of 0."""
    if not len(margins):
        return None
    low, high = min(float(margins.min()), 0.0), max(float(margins.max()), 0.0)
    width = (high - low) / BINS or 1.0
    edges = np.arange(math.floor(low / width) - 1, math.ceil(high / width) + 2) * width  # one more: rounding drops none
    counts = np.histogram(margins, edges)[0]
    filled = np.flatnonzero(counts)
    first, last = int(filled[0]), int(filled[-1]) + 1
    return MarginHistogram(edges[first : last + 1].tolist(), counts[first:last].tolist())


def _preference(columns: Columns) -> dict[str, float] | None:
    if not columns.scored.any():
        return None
    mean = columns.logp_mean[columns.scored]
    total = mean * columns.counted[columns.scored]
    return {name: float((logps[:, 0] > logps[:, 1]).mean()) for name, logps in (("mean", mean), ("sum", total))}
