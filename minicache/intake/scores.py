"""The second half of stage one: blocks of pairs -> their scores in the cache."""

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from minicache.cache.identity import TOLERANCE
from minicache.cache.schema import RefBlock
from minicache.cache.writer import CacheWriter
from minicache.errors import ModelError
from minicache.pairs import PairTable
from minicache.processes.world import World
from minicache.scoring.batching import balance
from minicache.scoring.handshake import check_reproduces
from minicache.scoring.scorer import Scorer
from minicache.scoring.tables import Budget, score_table
from minicache.trackers import Tracker

log = logging.getLogger(__name__)


def score_blocks(
    cache: CacheWriter, scorer: Scorer, budget: Budget, shard: tuple[int, int], world: World, tracker: Tracker
) -> tuple[list[int], int]:
    """Score the unscored blocks of a shard, each rank its share; returns these blocks and the number of their pairs."""
    todo, sizes, done = world.first(lambda: _todo(cache, *shard))
    if done:
        cached = world.each(lambda: cache.blocks.whole(done[0]))
        tolerance = TOLERANCE[cache.identity.dtype]
        world.together(
            lambda: check_reproduces(scorer, cached, world.device, tolerance, "the model"), meets=bool(scorer.lockstep)
        )
    if not todo:
        return [], 0
    pairs = int(sizes[:, 0].sum())
    shares = balance(sizes[:, 1], world.size)
    share = shares[world.rank]
    scale = pairs / max(1, int(sizes[share, 0].sum()))

    # Rank 0 shows the progress of all ranks, estimated from its own.
    def advance(pairs: int, tokens: int) -> None:
        tracker.advance(round(pairs * scale), round(tokens * scale))

    tracker.begin("scoring", pairs)
    # A block is written while the next one is scored.
    with ThreadPoolExecutor(1) as writer:
        written: Future[None] | None = None
        for block in (todo[index] for index in share):
            table, started = cache.blocks.pairs(block), time.monotonic()
            scores = _score(scorer, table, budget, cache.identity.per_token, world.device, advance)
            log.debug("block %d scored: %d pairs, %.1f s", block, len(table), time.monotonic() - started)
            _check_finite(cache, table, scores)
            if written:
                written.result()
            written = writer.submit(cache.write_ref, block, scores)
    if written:
        written.result()
    # Ranks with more blocks need the shards of the model that the others hold.
    if scorer.lockstep:
        table, nothing = cache.blocks.pairs(todo[0]), np.empty(0, np.int64)
        for _ in range(max(map(len, shares)) - len(share)):
            assert not list(score_table(scorer, table, nothing, budget, world.device))
    world.barrier()
    return todo, pairs


def _todo(cache: CacheWriter, number: int, of: int) -> tuple[list[int], np.ndarray, list[int]]:
    """The unscored blocks of shard `number` (from 1) of `of`; (n, 2) their pairs and stored tokens; the scored blocks."""
    unscored = cache.blocks.unscored()
    todo = [block for block in unscored if block % of == number - 1]
    done = set(range(len(cache.blocks))) - set(unscored)
    sizes = np.array([cache.blocks.size(block) for block in todo], np.int64).reshape(-1, 2)
    # First the blocks whose pairs this job has checked: its shard's and block 0.
    return todo, sizes, sorted(done, key=lambda block: (block > 0 and block % of != number - 1, block))


def _score(
    scorer: Scorer,
    table: PairTable,
    budget: Budget,
    per_token: bool,
    device: torch.device,
    advance: Callable[[int, int], None],
) -> RefBlock:
    """The scores of a block of pairs."""
    logp_mean = np.full((len(table), 2), np.nan, np.float32)
    token_logps = np.full(len(table.tokens), np.nan, np.float32) if per_token else None
    for indices, batch, scores in score_table(scorer, table, np.arange(len(table)), budget, device):
        logp_mean[indices] = scores.logp_mean.cpu().numpy()
        if token_logps is not None:
            spans = [np.arange(table.offsets[index], table.offsets[index + 1]) for index in indices]
            token_logps[np.concatenate(spans)[batch.places.cpu().numpy()]] = scores.token_logps.cpu().numpy()
        advance(len(indices), int(table.side_lengths[indices].sum()))
    return RefBlock(logp_mean, table.token_counts, token_logps)


def _check_finite(cache: CacheWriter, table: PairTable, scores: RefBlock) -> None:
    """Raises ModelError: a mean logprob is not finite."""
    if len(bad := np.flatnonzero(~np.isfinite(scores.logp_mean).all(axis=1))):
        file, line = table.source[bad[0]].tolist()
        raise ModelError(
            f"the model gives no finite logprob for {len(bad)} pairs, the first from {cache.log.sources[file].name}:{line}; "
            "nothing of their block was stored. Expected sound weights; in float16 try --dtype float32, into another --ref-cache"
        )
