"""Stage one: preference files + a frozen reference -> a reference cache."""

from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial

from minicache.cache.manifest import Source
from minicache.cache.refusals import REFUSED_FILE
from minicache.cache.writer import CacheWriter
from minicache.data.files import DataFile, read_rows
from minicache.data.places import located
from minicache.intake.prepare import prepare
from minicache.intake.scores import score_blocks
from minicache.models import LoadedModel, load_model
from minicache.options.stage_one import PrecomputeConfig
from minicache.options.where import Where
from minicache.processes.world import World
from minicache.scoring.budget import scoring_budget
from minicache.scoring.compiled import compile_layers, require_compiler
from minicache.scoring.dtype import agreed_dtype
from minicache.scoring.foresight import Held, require_room
from minicache.scoring.layout import settle_layout
from minicache.scoring.scorer import Scorer
from minicache.scoring.spread import is_sharded, refuse_quantized_shards, shards_of, spread
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
    config = replace(config, dtype=agreed_dtype(config.dtype, world, tracker.note, sharded))
    if config.compile:
        world.each(lambda: require_compiler(world.device))
    with ExitStack() as claims:
        tracker.begin("locating the data", None)
        # A wrong path should not cost the loading of a model.
        files = world.first(lambda: _located(config, claims, tracker))
        scorer = _reference(config, files, world, tracker, claims)
        cache = world.each(lambda: CacheWriter(config.ref_cache))
        # the others write under the claims that rank 0 holds
        held = world.broadcast(cache.place.held())
        if not world.is_main:
            claims.enter_context(cache.place.following(held))
        # read once; and all processes must decide by the same pairs
        pairs = world.first(cache.blocks.telling_pairs)
        settle_layout(scorer, pairs, config.layout, world, tracker)
        budget = Budget(config.tokens_per_batch or scoring_budget(scorer, pairs, world, tracker))
        if config.compile:
            compile_layers(scorer)
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


def _located(config: PrecomputeConfig, claims: ExitStack, tracker: Tracker) -> list[DataFile]:
    """The files of the data, each of which has a row that can be read."""
    files = claims.enter_context(located(config.data, tracker.note))
    for file in files:
        next(read_rows(file))
    return files


def _reference(
    config: PrecomputeConfig, files: list[DataFile], world: World, tracker: Tracker, claims: ExitStack
) -> Scorer:
    """The scorer of the reference. With the model loaded, rank 0 encodes the data into the cache."""
    sharded = is_sharded(config.parallel, world)
    held = Held(config.dtype, quantization=config.base.quantization, shards=shards_of(config.parallel, world))
    require_room(config.model, config.trust_remote_code, held, world)
    tracker.begin(f"loading {config.model}", None)
    # a model that will be in shards is read by rank 0 alone
    is_mine = world.is_main or not sharded
    load = partial(load_model, config.model, config.trust_remote_code, config.base.quantization)
    loaded = world.each(lambda: load() if is_mine else None)
    model = loaded.model if loaded else None
    refuse_quantized_shards(model, config.parallel, world)
    world.first(lambda: _bring_in(config, files, loaded, world, tracker, claims))
    if world.size > 1 and loaded and not sharded:
        world.agree(lambda: {f"{config.model}, the digest of its weights": loaded.fingerprint})
    return spread(model, config.dtype, config.parallel, world)


def _bring_in(
    config: PrecomputeConfig,
    files: list[DataFile],
    loaded: LoadedModel | None,
    world: World,
    tracker: Tracker,
    claims: ExitStack,
) -> None:
    """Encode the data into the cache."""
    assert loaded
    loaded.note_left_out(tracker.note)
    prepare(config, files, loaded, world.device, tracker, claims)
