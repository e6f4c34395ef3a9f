"""A table with the reference's logprobs -> a reference cache, for an exported one the very same. Its values stay the file's own.

The new cache appears complete or not at all. Only another program's file, or to compare weights, needs torch.
"""

import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from minicache.cache.drafts import drafted
from minicache.cache.schema import ATTRIBUTE, LEDGER_COLUMNS, CachedPairs, Manifest, pairs_row, ref_row
from minicache.cache.where import claimed, place_at
from minicache.cache.writer import CacheWriter
from minicache.config import Where
from minicache.config_exchange import ImportConfig
from minicache.data.tables import read_document, read_table
from minicache.errors import CacheError, CacheMismatch, ConfigError, DataError, RowRefused
from minicache.stages.export_cache import VERSION
from minicache.stages.rows import OF_EXPORTS, ExportedRow, from_row, to_block
from minicache.stages.tokenizer_files import require_fit, unpack
from minicache.trackers import Tracker


@dataclass(frozen=True)
class ImportReport:
    """What was made. identity: digest of what the values are, as stated. sources: the files that the pairs are of."""

    ref_cache: Where
    pairs: int
    blocks: int
    identity: str
    sources: list[dict[str, Any]]


def import_cache(config: ImportConfig, tracker: Tracker) -> ImportReport:
    """Make a cache of what `export` wrote, or of another program's rows.

    Raises:
        DataError: the file cannot be read, or a row of it is not what it should be. ConfigError: what it is was not stated.
        CacheMismatch: it is something else than stated. OutputError: `ref_cache` exists or cannot be written.
    """
    place_at(config.ref_cache).require_free(is_new=True)
    document = read_document(config.file)
    if document is None:
        _require_other_program(config.file)
        config.require_stated()
        from minicache.stages.import_foreign import import_foreign

        made = import_foreign(config, tracker)
    else:
        config.require_known()
        made = _import_exported(config, document, tracker)
    sources = [asdict(source) for source in made.log.sources]
    return ImportReport(config.ref_cache, made.log.pairs, made.log.blocks, made.identity.digest, sources)


def _require_other_program(file: str) -> None:
    """Raises DataError: the columns are those of an export, what says whose they are is lost. Text of it is rendered already."""
    _, row = next(read_table(file))
    if isinstance(row, dict) and all(name in row for name in OF_EXPORTS):
        raise DataError(
            f"{file}: has the columns of an export, but what says whose logprobs they are was lost when another program wrote it "
            "(or FILE.minicache.json is not beside it); export the cache again"
        )


# --- what `export --ref-cache` wrote ---


def _import_exported(config: ImportConfig, document: dict[str, Any], tracker: Tracker) -> Manifest:
    manifest, ledger = _read(config.file, document)
    _require_stated(config, manifest, tracker)
    out = place_at(config.ref_cache)
    tracker.begin("writing", manifest.log.pairs)
    with drafted(out, "importing") as (draft, claims), TemporaryDirectory(prefix="minidpo-") as scratch:
        tokenizer = Path(scratch) / "tokenizer"
        unpack(document.get("tokenizer"), tokenizer, config.file)
        require_fit(tokenizer, manifest.identity, config.file)
        empty = Manifest(manifest.identity, replace(manifest.log, sources=[], blocks=0, pairs=0, shards=0))
        cache = CacheWriter.create(draft, empty, partial(shutil.copytree, tokenizer))
        claims.enter_context(claimed(draft))
        for block, cached in enumerate(_blocks(config.file, manifest, ledger)):
            cache.grow(block + 1)
            cache.write_pairs(block, cached.table)
            cache.write_ref(block, cached.reference)
            tracker.advance(len(cached.table), len(cached.table.tokens))
        cache.manifest = replace(manifest, log=replace(manifest.log, shards=0))
        cache.write_log()
    return manifest


def _read(file: str, document: dict[str, Any]) -> tuple[Manifest, np.ndarray]:
    """What the document says: the cache's manifest, and its ledgers (blocks, 2, 5). Raises DataError, CacheMismatch."""
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
    pairs = ledger[:, 0, 1] if ledger.shape == (manifest.log.blocks, 2, len(LEDGER_COLUMNS)) else np.zeros(0)
    if (
        not len(pairs)
        or pairs.min() < 1
        or pairs.max() > manifest.identity.block_pairs
        or pairs.sum() != manifest.log.pairs
    ):
        raise DataError(f"{file}: its ledger does not fit its manifest; export the cache again")
    return manifest, ledger


def _require_stated(config: ImportConfig, manifest: Manifest, tracker: Tracker) -> None:
    """Raises unless the user says by the weights or by the digest that the file's values are what the file says."""
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
    """The cache's blocks as they were. Raises DataError: a row was changed, left out or added."""
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
