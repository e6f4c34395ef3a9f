"""Inspection of a reference cache: a report, single pairs, a page, and verification. Only `verify_model` needs torch."""

from pathlib import Path
from typing import TYPE_CHECKING

from minicache.cache.reader import ReferenceCache
from minicache.disk import check_writable, written_whole
from minicache.errors import CacheMismatch
from minicache.options.others import InspectConfig
from minicache.pages.cache import cache_page
from minicache.pages.cache_report import gather
from minicache.reports.contents import ReadCache, inspect_pair, read_cache
from minicache.trackers import Tracker

if TYPE_CHECKING:
    from minicache.processes.world import World

__all__ = ["inspect_pair", "read_cache", "verify_cache", "verify_model", "write_cache_page"]


def verify_cache(config: InspectConfig) -> list[str]:
    """Re-read everything and check every digest; returns one line for each problem."""
    return [str(problem) for _, problem in ReferenceCache(config.ref_cache).verify()]


def verify_model(config: InspectConfig, world: "World", tracker: Tracker) -> float:
    """Re-score a sample of the cache with `config.model`; returns the largest difference, nats per token.

    Raises:
        CacheMismatch: the model has other weights. HandshakeError: the same weights give other logprobs.
    """
    from minicache.cache.identity import TOLERANCE
    from minicache.models import load_model
    from minicache.models.precision import hold_for
    from minicache.scoring.handshake import check_reproduces
    from minicache.scoring.layout import settle_layout
    from minicache.scoring.loading import load_pairs
    from minicache.scoring.scorer import Scorer

    assert config.model
    cache = ReferenceCache(config.ref_cache)
    cached = load_pairs(cache, None, world, tracker)
    tracker.begin(f"loading {config.model}", None)
    loaded = load_model(config.model, config.trust_remote_code, cache.identity.quantization)
    if loaded.fingerprint != cache.identity.weights:
        raise CacheMismatch(
            f"{config.model}: weights digest {loaded.fingerprint}, the cache was made with {cache.identity.weights}"
        )
    tracker.begin("re-scoring a sample", None)
    dtype = cache.identity.dtype
    scorer = Scorer(hold_for(loaded.model, world.device, dtype), dtype)
    settle_layout(scorer, cached.table, "padded", world, tracker)
    return check_reproduces(scorer, cached, world.device, TOLERANCE[dtype], config.model)


def write_cache_page(read: ReadCache, file: Path, tracker: Tracker) -> Path:
    """Write the page of a cache, replacing an existing file; returns its path. Raises OutputError: it cannot be written."""
    check_writable(file)
    text = cache_page(gather(read, tracker))
    with written_whole(file) as draft:
        draft.write_text(text, encoding="utf-8", newline="\n")
    return file
