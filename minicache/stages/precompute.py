"""Stage one: preference files + a frozen reference -> a reference cache."""

from contextlib import ExitStack
from dataclasses import dataclass, field

from minicache.cache.manifest import Source
from minicache.cache.refusals import REFUSED_FILE
from minicache.cache.writer import CacheWriter
from minicache.data.files import read_rows
from minicache.intake.prepare import prepare
from minicache.intake.scores import score_blocks
from minicache.models import load_model
from minicache.options.stage_one import PrecomputeConfig
from minicache.options.where import Where
from minicache.processes.world import World
from minicache.scoring.layout import settle_layout
from minicache.scoring.scorer import resolve_dtype
from minicache.scoring.spread import is_sharded, spread
from minicache.trackers import Tracker


@dataclass(frozen=True)
class PrecomputeReport:
    """What stage one did.

    sources: every file of the cache. scored: pairs scored by this call, on all processes; scored_blocks: where they lie.
    blocks: of the cache. shard: which, if one was asked for; missing: blocks that then still have no scores, whosever they are.
    """

    ref_cache: Where
    sources: list[Source]
    pairs: int
    scored: int
    refused_file: Where
    scored_blocks: list[int]
    blocks: int
    shard: str | None = None
    missing: list[int] = field(default_factory=list)


def precompute(config: PrecomputeConfig, world: World, tracker: Tracker) -> PrecomputeReport:
    """Read, encode, score and store. What is already in the cache is not done again; of a shard, only its blocks are scored.

    Raises:
        MinicacheError: any of its kinds. If it was about the data, nothing of a new cache remains and an old one is as before;
            otherwise (a full disk, a model that gives no finite logprob) what is finished stays.
    """
    for file in config.data:  # a wrong path should not cost the loading of a model
        next(read_rows(file))
    tracker.begin(f"loading {config.model}", None)
    sharded = is_sharded(config.parallel, world)
    loaded = load_model(config.model, config.trust_remote_code) if world.is_main or not sharded else None
    dtype = resolve_dtype(config.dtype, world.device)
    with ExitStack() as claims:
        if world.is_main:
            assert loaded
            prepare(config, loaded, dtype, world.device, tracker, claims)
        world.barrier()
        scorer = spread(loaded.model if loaded else None, dtype, config.parallel, world)
        del loaded
        cache = CacheWriter(config.ref_cache)
        settle_layout(scorer, cache.blocks.pairs(0), config.layout, world.device, tracker)
        blocks, scored = score_blocks(cache, scorer, config.tokens_per_batch, config.share, world, tracker)
    refused_file = cache.place.locate(REFUSED_FILE)
    missing = cache.blocks.unscored() if config.shard and world.is_main else []
    return PrecomputeReport(
        cache.path,
        cache.log.sources,
        cache.log.pairs,
        scored,
        refused_file,
        blocks,
        len(cache.blocks),
        config.shard,
        missing,
    )
