"""Stage one: preference files + a frozen reference -> a reference cache."""

from contextlib import ExitStack
from dataclasses import dataclass, field, replace

from minicache.cache.manifest import Source
from minicache.cache.refusals import REFUSED_FILE
from minicache.cache.writer import CacheWriter
from minicache.data.files import read_rows
from minicache.data.places import located
from minicache.intake.prepare import prepare
from minicache.intake.scores import score_blocks
from minicache.models import load_model
from minicache.options.stage_one import PrecomputeConfig
from minicache.options.where import Where
from minicache.processes.world import World
from minicache.scoring.budget import scoring_budget
from minicache.scoring.layout import settle_layout
from minicache.scoring.scorer import resolve_dtype
from minicache.scoring.spread import is_sharded, refuse_quantized_shards, spread
from minicache.scoring.tables import Budget
from minicache.trackers import Tracker


@dataclass(frozen=True)
class PrecomputeReport:
    """The result of stage one.

    sources: every file of the cache. scored: pairs that this call scored, on all processes; scored_blocks: their blocks.
    blocks: number of blocks of the cache. shard: as asked for, such as "2/8", or None; missing: with a shard, the blocks of
    all shards that have no scores yet.
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
    """Read, encode, score and store all pairs that the cache does not hold yet; with a shard, score only its blocks.

    Raises:
        MinicacheError: of any kind. If the data is bad, nothing of a new cache remains and an old one is as before;
            otherwise (a full disk, a model without finite logprobs) finished blocks stay.
    """
    sharded = is_sharded(config.parallel, world)
    config = replace(config, dtype=resolve_dtype(config.dtype, world.device, tracker.note, sharded))
    with ExitStack() as claims:
        tracker.begin("locating the data", None)
        # A wrong path should not cost the loading of a model.
        files = claims.enter_context(located(config.data, tracker.note)) if world.is_main else []
        for file in files:
            next(read_rows(file))
        tracker.begin(f"loading {config.model}", None)
        mine = world.is_main or not sharded
        loaded = load_model(config.model, config.trust_remote_code, config.base.quantization) if mine else None
        refuse_quantized_shards(loaded.model if loaded else None, config.parallel, world)
        if world.is_main:
            assert loaded
            loaded.note_left_out(tracker.note)
            prepare(config, files, loaded, world.device, tracker, claims)
        world.barrier()
        scorer = spread(loaded.model if loaded else None, config.dtype, config.parallel, world)
        del loaded
        cache = CacheWriter(config.ref_cache)
        # read once; and all processes must decide by the same pairs
        pairs = world.broadcast(cache.blocks.telling_pairs() if world.is_main else None)
        settle_layout(scorer, pairs, config.layout, world.device, tracker)
        budget = Budget(config.tokens_per_batch or scoring_budget(scorer, pairs, world, tracker))
        blocks, scored = score_blocks(cache, scorer, budget, config.share, world, tracker)
    refused_file = cache.place.locate(REFUSED_FILE)
    missing = cache.blocks.unscored() if config.shard and world.is_main else []
    return PrecomputeReport(
        ref_cache=cache.path,
        sources=cache.log.sources,
        pairs=cache.log.pairs,
        scored=scored,
        refused_file=refused_file,
        scored_blocks=blocks,
        blocks=len(cache.blocks),
        shard=config.shard,
        missing=missing,
    )
