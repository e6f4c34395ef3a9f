"""What must fit before the first step: cache, batches, checkpoint and policy."""

import os
import shutil
from itertools import islice
from typing import Any

from minicache.cache.identity import TOLERANCE
from minicache.errors import CacheMismatch, ConfigError
from minicache.options.catalog import OPTIMIZERS
from minicache.scoring.batching import by_length
from minicache.scoring.handshake import check_reproduces, sample_differences
from minicache.trackers import Tracker
from minicache.training.optim import require_optimizer
from minicache.training.order import global_batches
from minicache.training.snapshot import pairs_of
from minicache.training.state import Run
from minicache.training.validation import require_per_token


def check(run: Run, state: dict[str, Any] | None) -> None:
    """What only the cache, the batches and the checkpoint together can tell.

    Raises:
        ConfigError: a loss over the whole batch, and the batch is split; something that an option needs is not here.
        CacheMismatch: the cache lacks what the loss needs, or is not the one that the run began with.
    """
    if state:
        _check_same_pairs(run, state)
    if run.scorer.lockstep:
        _check_sharded(run)
    require_per_token(run.cache, run.objective.options)
    require_optimizer(run.config.optimizer, run.world.device)
    if run.config.compile and not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
        raise ConfigError("--compile: expected a C++ compiler, g++ or clang++, found none; install one or leave it off")
    if name := run.objective.over_the_batch:
        _check_whole(run, name)


def _check_same_pairs(run: Run, state: dict[str, Any]) -> None:
    mine = pairs_of(run)
    if any(state[name] != mine[name] for name in ("cache", "pairs", "training")):
        raise CacheMismatch(
            f"{run.cache.path}: {mine['pairs']} pairs an epoch, their digest {mine['training']}, identity {mine['cache']}; "
            f"this run began with {state['pairs']}, {state['training']}, {state['cache']}. Expected the same: a run cannot change "
            "its pairs half-way"
        )
    if state["held_out"] != mine["held_out"]:
        raise CacheMismatch(
            f"{run.config.validation.eval_cache}: not the pairs that this run was validated on before; expected the same, or "
            "its validation losses cannot be compared"
        )


def _check_sharded(run: Run) -> None:
    """Refuse what cannot be done on shards of a parameter."""
    config = run.config
    by_name = " or ".join(name for name, entry in OPTIMIZERS.items() if entry.by_name)
    unfit = [("optimizer", name, by_name) for name, entry in OPTIMIZERS.items() if not entry.by_name]
    for name, value, others in [("dtype", "float16", "bfloat16"), *unfit]:
        if getattr(config, name) == value:
            raise ConfigError(
                f"--{name} {value}: not with --parallel {config.parallel}; expected {others}, or --parallel ddp"
            )


def _check_whole(run: Run, name: str) -> None:
    """Refuse a loss over the whole batch where a batch is split, or where it would have to judge a data set."""
    config, layout = run.config, run.scorer.layout
    costs = layout.costs(run.cached.table.lengths)
    if run.held_out:
        raise ConfigError(
            f"--loss {name}: sorts over a training batch, so it cannot judge held-out pairs; drop --holdout or --eval-cache"
        )
    if run.world.size > 1:
        raise ConfigError(
            f"--loss {name}: sorts over the whole batch, which {run.world.size} processes would split; use one"
        )
    for batch in islice(global_batches(run.training, config.batch_size, config.seed), run.steps):
        pieces = len(by_length(costs[batch], run.budget, layout.pads))
        if pieces > 1:
            raise ConfigError(
                f"--loss {name}: sorts over the whole batch, but {len(batch)} pairs make {pieces} micro-batches of "
                f"{run.budget} token slots; lower --batch-size or raise --tokens-per-micro-batch"
            )


def handshake(run: Run, tracker: Tracker) -> float:
    """Before the first step: does the policy reproduce the cache? Returns the largest difference, nats a token."""
    tracker.begin("handshake: re-scoring a few pairs", None)
    if source := run.config.init_from:
        worst = float(sample_differences(run.scorer, run.cached, run.world.device)[1].max())
        tracker.note(f"starts from {source}, not from the reference: they differ by up to {worst:.2g} nats a token")
        return worst
    tolerance = max(TOLERANCE[run.scorer.dtype], TOLERANCE[run.cache.identity.dtype])
    worst = check_reproduces(run.scorer, run.cached, run.world.device, tolerance, "the policy")
    tracker.note(
        f"handshake: the policy reproduces the cache within {worst:.1g} nats a token (tolerance {tolerance:g})"
    )
    return worst
