"""A reference cache as a table that other programs train from, complete enough to become the same cache again. No torch."""

from dataclasses import dataclass
from pathlib import Path

from minicache.cache.blocks import TOKENIZER
from minicache.cache.complete import each_whole_block
from minicache.cache.reader import ReferenceCache
from minicache.data.tokenizers import ChatTokenizer
from minicache.errors import CacheDamaged
from minicache.exchange.exported import document_of
from minicache.exchange.rows import PER_TOKEN, TYPES, to_columns
from minicache.exchange.tables import table_at
from minicache.intake.tokenizer_files import require_fit
from minicache.options.exchange import ExportCacheConfig
from minicache.trackers import Tracker


@dataclass(frozen=True)
class ExportCacheReport:
    """out: the file or directory written. identity: the digest to name at import.

    odd: the number of pairs with another mask than a program assumes that gets none: all of the answers, nothing else.
    """

    out: Path
    pairs: int
    identity: str
    odd: int


def export_cache(config: ExportCacheConfig, tracker: Tracker) -> ExportCacheReport:
    """Write every pair with its text, its sums, and all that it is rebuilt from. One block at a time is in memory.

    Raises:
        CacheError: the cache is missing, damaged or not complete. OutputError: the table cannot be written.
    """
    cache = ReferenceCache(config.ref_cache)
    cache.check_complete()
    if not (cache.tokenizer_dir / "tokenizer.json").is_file():
        raise CacheDamaged(f"{cache.place.locate(TOKENIZER)}: is missing; run its precompute-ref again, then export")
    require_fit(cache.tokenizer_dir, cache.identity, str(cache.path))
    tokenizer, types = ChatTokenizer.load(cache.tokenizer_dir), dict(TYPES)
    if cache.identity.per_token:
        types |= PER_TOKEN
    odd = 0
    tracker.begin(f"writing {config.out}", cache.log.pairs)
    with table_at(config.out, types, document_of(cache)) as write:
        for cached in each_whole_block(cache.blocks):
            columns, others = to_columns(cached, tokenizer, cache.log.sources)
            write(columns)
            odd += others
            tracker.advance(len(cached.table), len(cached.table.tokens))
    return ExportCacheReport(out=config.out, pairs=cache.log.pairs, identity=cache.identity.digest, odd=odd)
