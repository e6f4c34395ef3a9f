"""Export of a reference cache as a table for other programs, from which `import-cache` makes the same cache. No torch."""

import logging
import shlex
import time
from dataclasses import dataclass
from pathlib import Path

from minicache.cache.blocks import TOKENIZER
from minicache.cache.complete import each_whole_block
from minicache.cache.reader import ReferenceCache
from minicache.data.tokenizers import ChatTokenizer
from minicache.disk import written_whole
from minicache.errors import CacheDamaged
from minicache.exchange.exported import document_of
from minicache.exchange.rows import PER_TOKEN, TYPES, to_columns
from minicache.exchange.tables import table_at
from minicache.intake.tokenizer_files import require_fit
from minicache.options.exchange import ExportCacheConfig
from minicache.pages.card import FILE, is_unchanged
from minicache.pages.data_card import data_card
from minicache.trackers import Tracker

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExportCacheReport:
    """The result of an export.

    out: the file or directory written. identity: the digest to name at import.
    odd: the number of pairs whose mask is not "all tokens of the answers and no others", which other programs assume.
    card: the card beside or in it; None if another file of that name stays.
    """

    out: Path
    pairs: int
    identity: str
    odd: int
    card: Path | None


def export_cache(config: ExportCacheConfig, tracker: Tracker) -> ExportCacheReport:
    """Write every pair with its text, its sums, and the columns that rebuild it; one block at a time is in memory.

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
    odd, started = 0, time.monotonic()
    tracker.begin(f"writing {config.out}", cache.log.pairs)
    with table_at(config.out, types, document_of(cache)) as write:
        for cached in each_whole_block(cache.blocks):
            columns, others = to_columns(cached, tokenizer, cache.log.sources)
            write(columns)
            odd += others
            tracker.advance(len(cached.table), len(cached.table.tokens))
    log.debug("%s: %d rows written, %.1f s", config.out, cache.log.pairs, time.monotonic() - started)
    return ExportCacheReport(
        out=config.out,
        pairs=cache.log.pairs,
        identity=cache.identity.digest,
        odd=odd,
        card=_write_card(config.out, cache),
    )


def _write_card(out: Path, cache: ReferenceCache) -> Path | None:
    """Write the card of the table; returns its file. One that a person has written or changed stays."""
    file = out / FILE if out.is_dir() else out.with_name(f"{out.name}.md")
    if file.exists() and not (file.is_file() and is_unchanged(file.read_text(encoding="utf-8", errors="replace"))):
        return None
    digest = cache.identity.digest
    use = (
        f"```sh\nminidpo import-cache {shlex.quote(out.name)} --ref-cache cache/ --identity {digest}\n```\n\n"
        "makes the cache again. The columns are described in minidpo's documentation, under exchange; `prompt`, `chosen` and "
        "`rejected` are text, `ref_chosen_logps` and `ref_rejected_logps` the reference's sums over each answer, as TRL names them."
    )
    with written_whole(file) as draft:
        draft.write_text(data_card(cache.blocks.manifest, out.name, use), encoding="utf-8", newline="\n")
    return file
