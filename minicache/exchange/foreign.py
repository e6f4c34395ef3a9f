"""Another program's rows with the reference's logprobs -> a cache. Rows are encoded as by `precompute-ref`, but not scored."""

import logging
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from minicache.cache.manifest import Manifest
from minicache.cache.places.drafts import drafted
from minicache.cache.places.opening import place_at
from minicache.cache.schema import RefBlock
from minicache.cache.writer import CacheWriter
from minicache.data.files import DataFile, read_rows
from minicache.errors import DataError
from minicache.intake.prepare import prepare
from minicache.models import load_model
from minicache.options.exchange import BLOCK_PAIRS, ImportConfig
from minicache.options.stage_one import PrecomputeConfig
from minicache.pairs import CHOSEN, REJECTED, EncodedPair, PairTable
from minicache.trackers import Tracker

log = logging.getLogger(__name__)

# Columns of the logprobs of chosen and rejected: in TRL; in older TRL; in open-instruct's cache, written as columns.
LOGPS = (
    ("ref_chosen_logps", "ref_rejected_logps"),
    ("reference_chosen_logps", "reference_rejected_logps"),
    ("chosen_logps", "rejected_logps"),
)
COUNTS = ("chosen_token_count", "rejected_token_count")
# For each side, the columns of ids that together make up the whole side: TRL's, open-instruct's.
IDS = (
    (("prompt_ids", "chosen_ids"), ("prompt_ids", "rejected_ids")),
    (("chosen_input_ids",), ("rejected_input_ids",)),
)
OWN_COLUMNS = {
    *COUNTS,
    *(name for pair in LOGPS for name in pair),
    *(name for ids in IDS for names in ids for name in names),
}
# Nats: a sum of 0 may be rounded up to this.
ROUNDING = 1e-3
ADVICE = (
    "The logprobs are of other tokens: expected the model, template and options (--max-length, …) they were made with"
)


def import_foreign(config: ImportConfig, files: list[DataFile], tracker: Tracker) -> Manifest:
    """Encode the rows as stage one does, and store the file's logprobs instead of scoring; returns the manifest.

    Raises:
        DataError: a row lacks a logprob, has an impossible one, or was scored with other tokens. MinicacheError: as `precompute`.
    """
    started = time.monotonic()
    assert config.model and config.logps and config.dtype
    names = _names(files[0])
    tracker.begin(f"loading {config.model}", None)
    loaded = load_model(config.model, config.trust_remote_code, config.base.quantization)
    options: dict[str, Any] = {"block_pairs": BLOCK_PAIRS, **config.of_encoding, "dtype": config.dtype}
    with drafted(place_at(config.ref_cache)) as draft, ExitStack() as claims:
        request = PrecomputeConfig(
            model=config.model,
            data=(config.file,),
            ref_cache=draft,
            base=config.base,
            trust_remote_code=config.trust_remote_code,
            **options,
        )
        prepare(request, files, loaded, torch.device("cpu"), tracker, claims)
        cache = CacheWriter(draft)
        tracker.begin("copying the logprobs", cache.log.pairs)
        by_name = {file.name: file for file in files}
        rows = _numbered([by_name[source.name] for source in cache.log.sources])
        for block in range(len(cache.blocks)):
            table = cache.blocks.pairs(block)
            means = _means(rows, table, names, config, request)
            _require_likely(means, cache.identity.vocabulary, config)
            cache.write_ref(block, RefBlock(means.astype(np.float32), table.token_counts))
            tracker.advance(len(table), len(table.tokens))
        _count_as_used(cache)
    log.debug("%s: %d rows imported, %.1f s", config.file, cache.log.pairs, time.monotonic() - started)
    return cache.blocks.manifest


def _count_as_used(cache: CacheWriter) -> None:
    """Take the columns that the import reads out of the log's lists of unused ones."""
    for source in cache.log.sources:
        source.unused = {name: rows for name, rows in source.unused.items() if name not in OWN_COLUMNS}
    cache.write_log()


def _means(
    rows: Iterator[tuple[tuple[int, int], str, object]],
    table: PairTable,
    names: tuple[str, str],
    config: ImportConfig,
    request: PrecomputeConfig,
) -> NDArray[np.float64]:
    """(n, 2) the file's logprobs of a block of pairs, in nats per token."""
    values = np.full((len(table), 2), np.nan)
    for index, row, where in _rows_of(rows, table.source):
        values[index] = _logps(row, names, where)
        _check_tokens(row, table[index], table.token_counts[index], request, where)
    return values / table.token_counts if config.logps == "sum" else values


def _numbered(files: list[DataFile]) -> Iterator[tuple[tuple[int, int], str, object]]:
    """((number of the file, line), "file:line", row) for each row of the files."""
    for number, file in enumerate(files):
        for line, row in read_rows(file):
            yield (number, line), f"{file.name}:{line}", row


def _names(file: DataFile) -> tuple[str, str]:
    """The two columns of the logprobs, found in the first row. Raises DataError: there is not exactly one such pair."""
    _, row = next(read_rows(file))
    found = [pair for pair in LOGPS if isinstance(row, dict) and (pair[0] in row or pair[1] in row)]
    if len(found) != 1:
        known = "; ".join(f"{chosen}, {rejected}" for chosen, rejected in LOGPS)
        got = "none of them" if not found else f"several: {', '.join(chosen for chosen, _ in found)}"
        raise DataError(f"{file.name}: expected the reference's logprobs in one pair of columns ({known}), got {got}")
    return found[0]


def _rows_of(
    rows: Iterator[tuple[tuple[int, int], str, object]], places: NDArray[np.int64]
) -> Iterator[tuple[int, dict[str, Any], str]]:
    """(position, row, "file:line") of each pair of a block; the pairs of a cache have the order of the files' lines.

    places: (n, 2) number of the file and line of each pair.
    """
    for index, place in enumerate(map(tuple, places.tolist())):
        where, row = next((where, row) for at, where, row in rows if at == place)
        assert isinstance(row, dict)
        yield index, row, where


def _logps(row: dict[str, Any], names: tuple[str, str], where: str) -> list[float]:
    """The logprobs of chosen and rejected in a row. Raises DataError: one of them is not a logprob."""
    values = [row.get(name) for name in names]
    for name, value in zip(names, values, strict=True):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not -math.inf < value <= ROUNDING:
            raise DataError(f"{where}: {name}: expected a logprob, a finite number of at most 0, got {value!r}"[:400])
    return [float(value) for value in values if value is not None]


def _require_likely(means: NDArray[np.float64], vocabulary: int, config: ImportConfig) -> None:
    """Raises DataError: values too low to be means. means: (n, 2) nats per token; a uniform guess has -ln(vocabulary)."""
    typical, least = float(np.median(means)), -2 * math.log(vocabulary)
    if typical < least:
        raise DataError(
            f"{config.file}: typically {typical:.3g} nats per token; a uniform guess over {vocabulary:,} tokens has "
            f"{-math.log(vocabulary):.3g}. Expected means if --logps {config.logps} is right; are the columns sums (--logps sum)?"
        )


def _check_tokens(
    row: dict[str, Any], pair: EncodedPair, counts: NDArray[np.int32], request: PrecomputeConfig, where: str
) -> None:
    """Raises DataError: a row with counts or ids of tokens was scored with other tokens than this pair's."""
    theirs = [row.get(name) for name in COUNTS]
    if any(count is not None and count != ours for count, ours in zip(theirs, counts.tolist(), strict=True)):
        raise DataError(
            f"{where}: {', '.join(COUNTS)} are {theirs[0]}, {theirs[1]}; with these options {counts[CHOSEN]}, "
            f"{counts[REJECTED]} tokens count. {ADVICE}"
        )
    for columns in IDS:
        for side, names in enumerate(columns):
            if all(isinstance(row.get(name), list) for name in names):
                _check_ids(row, names, pair.side(side)[0].tolist(), request, where)


def _check_ids(
    row: dict[str, Any], names: tuple[str, ...], ours: list[int], request: PrecomputeConfig, where: str
) -> None:
    """Raises DataError: the ids of a side, in the columns `names`, are not `ours`."""
    theirs = [token for name in names for token in row[name]]
    # What truncation from the left would leave of them is not known.
    if len(theirs) > request.max_length and request.truncate == "left":
        return
    theirs = theirs[: request.max_length]
    if theirs != ours:
        pairs = enumerate(zip(theirs, ours, strict=False))
        at = next((i for i, (a, b) in pairs if a != b), min(len(theirs), len(ours)))
        raise DataError(
            f"{where}: {' and '.join(names)} hold {len(theirs)} tokens, with these options there are {len(ours)}, and they "
            f"differ from token {at} on. {ADVICE}"
        )
