"""A table with the reference's logprobs -> a reference cache, for an exported one the very same. Its values stay the file's own.

The new cache appears complete or not at all. Only another program's file, or to compare weights, needs torch.
"""

from dataclasses import asdict, dataclass
from typing import Any

from minicache.cache.places.opening import place_at
from minicache.errors import DataError
from minicache.exchange.exported import import_exported
from minicache.exchange.rows import OF_EXPORTS
from minicache.exchange.tables import read_document, read_table
from minicache.options.exchange import ImportConfig
from minicache.options.where import Where
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
        from minicache.exchange.foreign import import_foreign

        made = import_foreign(config, tracker)
    else:
        config.require_known()
        made = import_exported(config, document, tracker)
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
