"""The document of an exported cache, and making the same cache again from the exported table."""

import logging
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np

from minicache.cache.complete import ledgers
from minicache.cache.manifest import ATTRIBUTE, Manifest
from minicache.cache.places.drafts import drafted
from minicache.cache.places.opening import place_at
from minicache.cache.reader import ReferenceCache
from minicache.cache.schema import LEDGER_COLUMNS, CachedPairs, pairs_row, ref_row
from minicache.cache.writer import CacheWriter
from minicache.disk import scratch_folder
from minicache.errors import CacheError, CacheMismatch, ConfigError, DataError, RowRefused
from minicache.exchange.rows import ExportedRow, from_row, to_block
from minicache.exchange.tables import read_table
from minicache.intake.tokenizer_files import pack, require_fit, unpack
from minicache.options.exchange import ImportConfig
from minicache.trackers import Tracker

log = logging.getLogger(__name__)

# Of the document.
VERSION = 1


def document_of(cache: ReferenceCache) -> dict[str, Any]:
    """The document of a cache: its manifest, the rows of its ledgers, and its tokenizer's files."""
    return {
        "export": VERSION,
        **cache.blocks.manifest.to_attributes(),
        "ledger": ledgers(cache.blocks).tolist(),
        "tokenizer": pack(cache.tokenizer_dir),
    }


# --- import ---


def import_exported(config: ImportConfig, document: dict[str, Any], tracker: Tracker) -> Manifest:
    """Make the cache again that `export --ref-cache` wrote with this document; returns its manifest.

    Raises:
        DataError: the file was changed. ConfigError: the user did not state which model's values it holds. CacheMismatch: it
            holds those of another. OutputError: the cache cannot be written.
    """
    started = time.monotonic()
    manifest, ledger = _read(config.file, document)
    _require_stated(config, manifest, tracker)
    out = place_at(config.ref_cache)
    tracker.begin("writing", manifest.log.pairs)
    with drafted(out) as draft, scratch_folder("import") as scratch:
        tokenizer = scratch / "tokenizer"
        unpack(document.get("tokenizer"), tokenizer, config.file)
        require_fit(tokenizer, manifest.identity, config.file)
        empty = replace(manifest.log, sources=[], blocks=0, pairs=0, shards=0)
        cache = CacheWriter.create(draft, Manifest(manifest.identity, empty), partial(shutil.copytree, tokenizer))
        cache.append(_blocks(config.file, manifest, ledger), tracker)
        cache.write_log(replace(manifest.log, shards=0))
    log.debug("%s: %d rows imported, %.1f s", config.file, manifest.log.pairs, time.monotonic() - started)
    return manifest


def _read(file: str, document: dict[str, Any]) -> tuple[Manifest, np.ndarray]:
    """The manifest and the ledgers (blocks, 2, 5) in the document. Raises DataError, CacheMismatch."""
    if document.get("export") != VERSION:
        raise DataError(
            f"{file}: has export format {document.get('export')!r}, this program reads {VERSION}; use the version that wrote it"
        )
    try:
        manifest = Manifest.from_attributes({ATTRIBUTE: document.get(ATTRIBUTE)}, file)
        ledger = np.array(document.get("ledger"), np.int64)
    except CacheMismatch:
        raise
    except (CacheError, TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{file}: its document was changed: {error}; export the cache again") from error
    if not _fits(ledger, manifest):
        raise DataError(f"{file}: its ledger does not fit its manifest; export the cache again")
    return manifest, ledger


def _fits(ledger: np.ndarray, manifest: Manifest) -> bool:
    """Whether a ledger has the manifest's numbers of blocks and pairs, and no block is empty or too large."""
    if ledger.shape != (manifest.log.blocks, 2, len(LEDGER_COLUMNS)) or not manifest.log.blocks:
        return False
    pairs = ledger[:, 0, 1]
    within = pairs.min() >= 1 and pairs.max() <= manifest.identity.block_pairs
    return bool(within and pairs.sum() == manifest.log.pairs)


def _require_stated(config: ImportConfig, manifest: Manifest, tracker: Tracker) -> None:
    """Check the user's statement, by a model's weights or by the digest, which model's values the file holds.

    Raises:
        ConfigError: there is no statement. CacheMismatch: the file holds values of another model.
    """
    digest = manifest.identity.digest
    if not config.model and not config.identity:
        raise ConfigError(
            f"{config.file}: contains logprobs of {manifest.log.model}, identity {digest}. Expected you to confirm it: "
            f"--identity {digest}, or --model MODEL to compare the weights"
        )
    if config.identity and config.identity != digest:
        raise CacheMismatch(f"{config.file}: its identity is {digest}, expected {config.identity} (--identity)")
    if config.model:
        from minicache.models import load_model

        tracker.begin(f"loading {config.model}", None)
        weights = load_model(config.model, config.trust_remote_code).fingerprint
        if weights != manifest.identity.weights:
            raise CacheMismatch(
                f"{config.file}: its logprobs are of weights {manifest.identity.weights}, {config.model} has {weights}; "
                "expected the model that it was exported for"
            )


def _blocks(file: str, manifest: Manifest, ledger: np.ndarray) -> Iterator[CachedPairs]:
    """The blocks of the exported cache. Raises DataError: a row was changed, left out or added."""
    rows = read_table(file)
    miscounted = f"{file}: expected the {manifest.log.pairs} rows exported, got {{}}; export the cache again"
    for block, (pairs, scores) in enumerate(ledger):
        numbered = [(number, _row(file, number, row, manifest)) for number, row in islice(rows, int(pairs[1]))]
        if len(numbered) < pairs[1]:
            raise DataError(miscounted.format("fewer"))
        cached = to_block([row for _, row in numbered], manifest.identity)
        found = pairs_row(manifest.identity, cached.table), ref_row(manifest.identity, cached.reference, pairs)
        if not np.array_equal(found, (pairs, scores)):
            raise DataError(
                f"{file}: rows {numbered[0][0]} to {numbered[-1][0]} (block {block} of the cache) are not those exported: a "
                "logprob, a line or their order was changed; export the cache again"
            )
        yield cached
    if next(rows, None) is not None:
        raise DataError(miscounted.format("more"))


def _row(file: str, number: int, row: object, manifest: Manifest) -> ExportedRow:
    """The pair of a row, checked. Raises DataError."""
    where = f"{file}:{number}"
    if isinstance(row, RowRefused):
        raise DataError(f"{where}: {row}; export the cache again")
    exported = from_row(row, manifest.identity, where)
    if not 0 <= exported.pair.source[0] < (files := len(manifest.log.sources)):
        raise DataError(f"{where}: has the file number {exported.pair.source[0]}, expected one below {files}")
    return exported
