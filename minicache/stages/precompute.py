"""Stage one: preference files + a frozen reference -> a reference cache."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np
import torch

from minicache.cache.schema import TOLERANCE, CachedPairs, RefBlock, Source
from minicache.cache.writer import CacheWriter
from minicache.config import PrecomputeConfig, Where
from minicache.data.batching import balance
from minicache.data.formats import read_rows
from minicache.distributed import World
from minicache.errors import ModelError
from minicache.evaluation import check_reproduces, score_table, settle_layout
from minicache.models import load_model
from minicache.pairs import PairTable
from minicache.parallel import is_sharded, spread
from minicache.scoring import Scorer, resolve_dtype
from minicache.stages.intake import REFUSED_FILE
from minicache.stages.prepare import prepare
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
        settle_layout(scorer, cache.pairs(0), config.layout, world.device, tracker)
        blocks, scored = _score_blocks(cache, scorer, config.tokens_per_batch, config.share, world, tracker)
    refused_file = cache.place.locate(REFUSED_FILE)
    missing = cache.unscored() if config.shard and world.is_main else []
    return PrecomputeReport(
        cache.path,
        cache.log.sources,
        cache.log.pairs,
        scored,
        refused_file,
        blocks,
        cache.blocks,
        config.shard,
        missing,
    )


def _score_blocks(
    cache: CacheWriter, scorer: Scorer, budget: int | None, shard: tuple[int, int], world: World, tracker: Tracker
) -> tuple[list[int], int]:
    """Score the shard's blocks that are not, each rank its share; returns which, and how many pairs that were."""
    todo, sizes, done = world.broadcast(_todo(cache, *shard) if world.is_main else None)
    if done:
        cached = CachedPairs(cache.pairs(done[0]), cache.ref(done[0]))
        check_reproduces(scorer, cached, world.device, TOLERANCE[cache.identity.dtype], "the model")
    if not todo:
        return [], 0
    pairs = int(sizes[:, 0].sum())
    shares = balance(sizes[:, 1], world.size)
    share = shares[world.rank]
    scale = pairs / max(1, int(sizes[share, 0].sum()))

    def tell(pairs: int, tokens: int) -> None:  # rank 0 tells of everyone's progress by its own
        tracker.advance(round(pairs * scale), round(tokens * scale))

    tracker.begin("scoring", pairs)
    with ThreadPoolExecutor(1) as writer:  # a block is written while the next is scored
        written: Future[None] | None = None
        for block in (todo[index] for index in share):
            table = cache.pairs(block)
            scores = _score(scorer, table, budget, cache.identity.per_token, world.device, tell)
            _check_finite(cache, table, scores)
            if written:
                written.result()
            written = writer.submit(cache.write_ref, block, scores)
    if written:
        written.result()
    if scorer.lockstep:  # those with more blocks need everyone's shards of the model
        table, nothing = cache.pairs(todo[0]), np.empty(0, np.int64)
        for _ in range(max(map(len, shares)) - len(share)):
            assert not list(score_table(scorer, table, nothing, budget, world.device))
    world.barrier()
    return todo, pairs


def _todo(cache: CacheWriter, number: int, of: int) -> tuple[list[int], np.ndarray, list[int]]:
    """Blocks to score of shard `number` (from 1) of so many; their sizes: (n, 2) pairs and stored tokens; blocks already scored."""
    unscored = cache.unscored()
    todo = [block for block in unscored if block % of == number - 1]
    done = set(range(cache.blocks)) - set(unscored)
    sizes = np.array([cache.block_size(block) for block in todo], np.int64).reshape(-1, 2)
    # first those whose pairs were found sound: of other shards' blocks nobody has looked at them
    return todo, sizes, sorted(done, key=lambda block: (block > 0 and block % of != number - 1, block))


def _score(
    scorer: Scorer,
    table: PairTable,
    budget: int | None,
    per_token: bool,
    device: torch.device,
    tell: Callable[[int, int], None],
) -> RefBlock:
    logp_mean = np.full((len(table), 2), np.nan, np.float32)
    token_logps = np.full(len(table.tokens), np.nan, np.float32) if per_token else None
    for indices, batch, scores in score_table(scorer, table, np.arange(len(table)), budget, device):
        logp_mean[indices] = scores.logp_mean.cpu().numpy()
        if token_logps is not None:
            spans = [np.arange(table.offsets[index], table.offsets[index + 1]) for index in indices]
            token_logps[np.concatenate(spans)[batch.places.cpu().numpy()]] = scores.token_logps.cpu().numpy()
        tell(len(indices), int(table.side_lengths[indices].sum()))
    return RefBlock(logp_mean, table.token_counts, token_logps)


def _check_finite(cache: CacheWriter, table: PairTable, scores: RefBlock) -> None:
    if len(bad := np.flatnonzero(~np.isfinite(scores.logp_mean).all(axis=1))):
        file, line = table.source[bad[0]].tolist()
        raise ModelError(
            f"the model gives no finite logprob for {len(bad)} pairs, the first from {cache.log.sources[file].name}:{line}; "
            "nothing of their block was stored. Expected sound weights; in float16 try --dtype float32, into another --ref-cache"
        )
