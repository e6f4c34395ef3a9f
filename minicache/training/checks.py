"""Checks before the first step: that cache, batches, checkpoint, options and policy fit each other."""

from hashlib import blake2b
from itertools import islice
from typing import Any

import torch

from minicache.cache.identity import TOLERANCE
from minicache.errors import CacheMismatch, ConfigError
from minicache.models.fingerprint import sampled_digest
from minicache.options.catalog import OPTIMIZERS, WEIGHTS
from minicache.options.checks import check_weights
from minicache.options.train import TrainConfig
from minicache.scoring.batching import by_length
from minicache.scoring.compiled import require_compiler
from minicache.scoring.handshake import check_reproduces, sample_differences
from minicache.trackers import Tracker
from minicache.training.losses import Objective
from minicache.training.optim import require_optimizer
from minicache.training.order import global_batches
from minicache.training.snapshot import pairs_of
from minicache.training.state import Run


def require(config: TrainConfig, device: torch.device, processes: int) -> None:
    """Check what depends on options and machine alone, before anything is loaded.

    config: its --dtype is resolved. processes: of the run.

    Raises:
        ConfigError: options do not go together here, or a library or a compiler is missing.
    """
    name, optimizer = config.optimizer, WEIGHTS[config.weights][config.optimizer]
    if optimizer.alone and processes > 1:
        raise ConfigError(f"--optimizer {name}: not with {processes} processes; expected adamw, or adamw-8bit")
    if optimizer.alone and config.dtype == "float16":
        raise ConfigError(f"--optimizer {name}: not with --dtype float16; expected adamw, or adamw-8bit")
    parallel = config.parallel if processes > 1 else "ddp"
    check_weights(config.weights, name, config.lora.wanted, config.dtype, parallel)
    if parallel != "ddp" and config.dtype == "float16":
        raise ConfigError(f"--dtype float16: not with --parallel {parallel}; expected bfloat16, or --parallel ddp")
    if parallel != "ddp" and not optimizer.by_name:
        fit = " or ".join(each for each, entry in OPTIMIZERS.items() if entry.by_name)
        raise ConfigError(f"--optimizer {name}: not with --parallel {parallel}; expected {fit}, or --parallel ddp")
    require_optimizer(name, config.weights, device)
    if config.compile:
        require_compiler(device)
    _require_whole_batches(config, processes)


def _require_whole_batches(config: TrainConfig, processes: int) -> None:
    """Raises ConfigError: a loss sorts over the whole batch, but processes split it, or there are held-out pairs."""
    name = Objective.parse(config.loss, config.logps, config.beta, config.loss_options).over_the_batch
    if name and config.validation.wanted:
        raise ConfigError(
            f"--loss {name}: sorts over a training batch, so it cannot judge held-out pairs; drop --holdout or --eval-cache"
        )
    if name and processes > 1:
        raise ConfigError(
            f"--loss {name}: sorts over the whole batch, which {processes} processes would split; use one"
        )


def agree(run: Run, state: dict[str, Any] | None) -> None:
    """Require that all processes have the same pairs, plan, checkpoint and weights: each takes its share of every batch by itself.

    Pairs were compared when they were read, and layout and budget are the same by the way they are chosen.

    Raises:
        ConfigError: a process has others.
    """
    pairs = pairs_of(run)
    facts = {"the caches, their identity": pairs["cache"], "the pairs to train on": pairs["training"]}
    facts |= {"the pairs to validate on": pairs["held_out"], "the steps of the run": run.steps}
    if state:
        facts |= {"the checkpoint to resume from": blake2b(repr(state["progress"]).encode(), digest_size=8).hexdigest()}
    # of a model in shards, all weights are rank 0's
    if not run.scorer.lockstep:
        facts["the policy's weights"] = sampled_digest(run.scorer.model)
    run.world.agree(lambda: facts)


def check(run: Run, state: dict[str, Any] | None) -> None:
    """Check what depends on the cache, the batches and the checkpoint together.

    Raises:
        ConfigError: a loss over the whole batch, and the token budget splits it.
        CacheMismatch: the cache is not the one that the run began with.
    """
    if state:
        _check_same_pairs(run, state)
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


def _check_whole(run: Run, name: str) -> None:
    """Raises ConfigError: the loss sorts over the whole batch, and one does not fit a micro-batch."""
    config, layout = run.config, run.scorer.layout
    costs = layout.costs(run.cached.table.lengths)
    for batch in islice(global_batches(run.training, config.batch_size, config.seed), run.steps):
        pieces = len(by_length(costs[batch], run.budget, layout.pads))
        if pieces > 1:
            raise ConfigError(
                f"--loss {name}: sorts over the whole batch, but {len(batch)} pairs make {pieces} micro-batches of "
                f"{run.budget} token slots; lower --batch-size or raise --tokens-per-micro-batch"
            )


def handshake(run: Run, tracker: Tracker) -> float:
    """Score a few cached pairs with the policy; returns the largest difference from the cache, nats per token.

    Raises:
        HandshakeError: the policy should have the reference's weights, and does not reproduce the cache.
    """
    tracker.begin("handshake: re-scoring a few pairs", None)
    world, meets = run.world, bool(run.scorer.lockstep)
    if source := run.config.init_from:
        found = world.together(lambda: float(sample_differences(run.scorer, run.cached, world.device)[1].max()), meets)
        tracker.note(
            f"starts from {source}, not from the reference: they differ by up to {max(found):.2g} nats per token"
        )
        return max(found)
    tolerance = max(TOLERANCE[run.scorer.dtype], TOLERANCE[run.cache.identity.dtype])
    found = world.together(
        lambda: check_reproduces(run.scorer, run.cached, world.device, tolerance, "the policy"), meets
    )
    tracker.note(
        f"handshake: the policy reproduces the cache within {max(found):.1g} nats per token (tolerance {tolerance:g})"
    )
    return max(found)
