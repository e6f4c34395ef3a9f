"""Import of a table with the reference's logprobs into a new reference cache. An exported table becomes the same cache again.

The new cache appears complete or not at all. Torch is needed only for another program's file and to compare weights.
"""

from dataclasses import asdict, dataclass
from typing import Any

from minicache.cache.places.opening import place_at
from minicache.data.files import DataFile, read_rows
from minicache.data.places import located
from minicache.errors import DataError
from minicache.exchange.exported import import_exported
from minicache.exchange.rows import OF_EXPORTS
from minicache.exchange.tables import read_document
from minicache.options.exchange import ImportConfig
from minicache.options.where import Where
from minicache.trackers import Tracker


@dataclass(frozen=True)
class ImportReport:
    """The new cache. identity: digest of its identity. sources: the files that its pairs come from."""

    ref_cache: Where
    pairs: int
    blocks: int
    identity: str
    sources: list[dict[str, Any]]


def import_cache(config: ImportConfig, tracker: Tracker) -> ImportReport:
    """Make a cache from a table of `export`, or from another program's rows.

    Raises:
        DataError: the file cannot be read, or a row of it cannot be used. ConfigError: the user did not state which model's
            values it holds. CacheMismatch: it holds those of another. OutputError: `ref_cache` exists or cannot be written.
    """
    place_at(config.ref_cache).require_free(is_new=True)
    document = read_document(config.file)
    if document is None:
        with located((config.file,), tracker.note) as files:
            _require_other_program(files[0])
            config.require_stated()
            from minicache.exchange.foreign import import_foreign

            made = import_foreign(config, files, tracker)
    else:
        config.require_known()
        made = import_exported(config, document, tracker)
    sources = [asdict(source) for source in made.log.sources]
    return ImportReport(
        ref_cache=config.ref_cache,
        pairs=made.log.pairs,
        blocks=made.log.blocks,
        identity=made.identity.digest,
        sources=sources,
    )


def _require_other_program(file: DataFile) -> None:
    """Raises DataError: an exported table without its document. Its model is unknown, and its text is already rendered."""
    _, row = next(read_rows(file))
    if isinstance(row, dict) and all(name in row for name in OF_EXPORTS):
        raise DataError(
            f"{file.name}: has the columns of an export, but what says whose logprobs they are was lost when another program wrote "
            "it (or FILE.minicache.json is not beside it); export the cache again"
        )
