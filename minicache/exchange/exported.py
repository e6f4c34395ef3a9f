"""The document that travels with an exported cache, and the way back."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from minicache.cache.complete import ledgers
from minicache.cache.manifest import ATTRIBUTE, Manifest
from minicache.cache.places.drafts import drafted
from minicache.cache.places.opening import claimed, place_at
from minicache.cache.reader import ReferenceCache
from minicache.cache.schema import LEDGER_COLUMNS, CachedPairs, pairs_row, ref_row
from minicache.cache.writer import CacheWriter
from minicache.errors import CacheError, CacheMismatch, ConfigError, DataError, RowRefused
from minicache.exchange.rows import ExportedRow, from_row, to_block
from minicache.exchange.tables import read_table
from minicache.intake.tokenizer_files import pack, require_fit, unpack
from minicache.options.exchange import ImportConfig
from minicache.trackers import Tracker

VERSION = 1  # of the document that travels with a table


def document_of(cache: ReferenceCache) -> dict[str, Any]:
    """The cache's manifest, its ledger block by block, and its tokenizer."""
    return {
        "export": VERSION,
        **cache.blocks.manifest.to_attributes(),
        "ledger": ledgers(cache.blocks).tolist(),
        "tokenizer": pack(cache.tokenizer_dir),
    }


# --- the way back ---


def import_exported(config: ImportConfig, document: dict[str, Any], tracker: Tracker) -> Manifest:
    """Make the cache again that `export --ref-cache` wrote with this document; returns its manifest.

    Raises:
        DataError: the file was changed. ConfigError: the user did not state whose values it holds. CacheMismatch: it holds others.
        OutputError: the cache cannot be written.
    """
    manifest, ledger = _read(config.file, document)
    _require_stated(config, manifest, tracker)
    out = place_at(config.ref_cache)
    tracker.begin("writing", manifest.log.pairs)
    with drafted(out, "importing") as (draft, claims), TemporaryDirectory(prefix="minidpo-") as scratch:
        tokenizer = Path(scratch) / "tokenizer"
        unpack(document.get("tokenizer"), tokenizer, config.file)
        require_fit(tokenizer, manifest.identity, config.file)
        empty = replace(manifest.log, sources=[], blocks=0, pairs=0, shards=0)
        cache = CacheWriter.create(draft, Manifest(manifest.identity, empty), partial(shutil.copytree, tokenizer))
        claims.enter_context(claimed(draft))
        _write_blocks(cache, _blocks(config.file, manifest, ledger), tracker)
        cache.write_log(replace(manifest.log, shards=0))
    return manifest


def _write_blocks(cache: CacheWriter, blocks: Iterator[CachedPairs], tracker: Tracker) -> None:
    for block, cached in enumerate(blocks):
        cache.grow(block + 1)
        cache.write_pairs(block, cached.table)
        cache.write_ref(block, cached.reference)
        tracker.advance(len(cached.table), len(cached.table.tokens))


def _read(file: str, document: dict[str, Any]) -> tuple[Manifest, np.ndarray]:
    """The cache's manifest and its ledgers (blocks, 2, 5), as the document has them. Raises DataError, CacheMismatch."""
    if document.get("export") != VERSION:
        raise DataError(
            f"{file}: was exported in form {document.get('export')!r}, this program reads {VERSION}; use the version that wrote it"
        )
    try:
        manifest = Manifest.from_attributes({ATTRIBUTE: document.get(ATTRIBUTE)}, file)
        ledger = np.array(document.get("ledger"), np.int64)
    except CacheMismatch:
        raise
    except (CacheError, TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{file}: what it says of itself was changed: {error}; export the cache again") from error
    if not _fits(ledger, manifest):
        raise DataError(f"{file}: its ledger does not fit its manifest; export the cache again")
    return manifest, ledger


def _fits(ledger: np.ndarray, manifest: Manifest) -> bool:
    """Whether a ledger has the manifest's number of blocks and pairs, and no block is empty or too large."""
    if ledger.shape != (manifest.log.blocks, 2, len(LEDGER_COLUMNS)) or not manifest.log.blocks:
        return False
    pairs = ledger[:, 0, 1]
    within = pairs.min() >= 1 and pairs.max() <= manifest.identity.block_pairs
    return bool(within and pairs.sum() == manifest.log.pairs)


def _require_stated(config: ImportConfig, manifest: Manifest, tracker: Tracker) -> None:
    """Refuse the file unless the user confirms, by the weights or by the digest, whose values it holds."""
    digest = manifest.identity.digest
    if not config.model and not config.identity:
        raise ConfigError(
            f"{config.file}: says that its logprobs are of {manifest.log.model}, identity {digest}. Expected you to say so: "
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
    """The blocks of the cache that was exported. Raises DataError: a row was changed, left out or added."""
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
    where = f"{file}:{number}"
    if isinstance(row, RowRefused):
        raise DataError(f"{where}: {row}; export the cache again")
    exported = from_row(row, manifest.identity, where)
    if not 0 <= exported.pair.source[0] < (files := len(manifest.log.sources)):
        raise DataError(f"{where}: is of file number {exported.pair.source[0]}, expected one below {files}")
    return exported
