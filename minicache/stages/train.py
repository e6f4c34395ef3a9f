"""Stage two: a reference cache -> a trained policy. Only the policy is in memory."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from minicache.cache.reader import JoinedCaches, ReferenceCache
from minicache.cache.schema import CachedPairs
from minicache.errors import OutputError
from minicache.models import checkpoint_activations
from minicache.options.dictionaries import flat
from minicache.options.train import TrainConfig
from minicache.processes.world import World
from minicache.scoring.budget import training_budget
from minicache.scoring.layout import settle_layout
from minicache.scoring.loading import Sources
from minicache.scoring.scorer import Scorer, decoder_of, resolve_dtype
from minicache.scoring.spread import is_sharded, spread
from minicache.trackers import Tracker, TrackerGroup
from minicache.training import checkpoints
from minicache.training.checks import check, handshake
from minicache.training.loop import optimize
from minicache.training.losses import Objective
from minicache.training.order import training_steps
from minicache.training.policy import load_policy
from minicache.training.pool import choose_pairs
from minicache.training.resuming import resume_at
from minicache.training.run_directory import run_facts, starts_at_ln_2, write_facts
from minicache.training.saving import open_run, save_dtype, save_policy
from minicache.training.state import Progress, Run

FROM_DISK = Sources()


@dataclass(frozen=True)
class TrainReport:
    """What a run did.

    model_step: optimizer steps behind the saved model. noise: the largest difference the handshake found, nats a token; None for a
    run that began from other weights on purpose. stopped: why it ended before its time, if so. from_ln_2: the loss is one that is
    ln 2 where policy and reference agree.
    """

    out: Path
    model_dir: Path
    model_step: int
    noise: float | None
    stopped: str | None
    progress: Progress
    from_ln_2: bool


def train(config: TrainConfig, world: World, tracker: Tracker, sources: Sources = FROM_DISK) -> TrainReport:
    """Train a policy against cached reference logprobs and save it as a Hugging Face directory, or as an adapter.

    sources: who reads pairs and model; the model is this run's own, to be changed.

    Raises:
        MinicacheError: any of its kinds; the run directory is not made before everything about the request is known to fit.
        KeyboardInterrupt: on SIGINT or SIGTERM, after the state was saved.
    """
    config = replace(config, dtype=resolve_dtype(config.dtype, world.device))
    objective = Objective.parse(config.loss, config.logps, config.beta, config.loss_options)
    resumed = world.broadcast(resume_at(config) if world.is_main else None)
    facts = run_facts(config.out)
    if "outcome" in facts:
        tracker.note(f"{config.out}: this run is finished; nothing to resume")
        return _report(config.out, facts)
    caches = JoinedCaches([ReferenceCache(where) for where, _ in config.caches])
    cached, cache = sources.pairs(caches, config.scratch, world, tracker), caches.caches[0]
    training, held_out = choose_pairs(config, caches, cached, world, tracker, sources)
    steps = training_steps(len(training), config.batch_size, config.epochs, config.max_steps)
    state = None if resumed is None else checkpoints.load(config.out, resumed)
    mine = world.is_main or not is_sharded(config.parallel, world)
    policy, source, stored = load_policy(config, cache, resumed, tracker, sources) if mine else (None, "", "")
    scorer = spread(policy, config.dtype, config.parallel, world)
    del policy
    settle_layout(scorer, cached.table, config.layout, world.device, tracker)
    budget = config.tokens_per_micro_batch or facts.get("token_budget") or _budget(config, scorer, cached, world)
    run = Run(config, world, scorer, objective, cache, cached, training, held_out, steps, budget)
    check(run, state)
    if state is None:
        started = {"started_from": source, "stored_dtype": stored, "handshake": handshake(run, tracker)}
        facts = {**flat(config), **started, **_sizes(run)}
    if config.activation_checkpointing:
        checkpoint_activations(scorer.model)
    if config.compile:
        decoder_of(scorer.model).compile(
            dynamic=True
        )  # not the head: its number of positions is another in every batch
    with open_run(run, facts, resumed, tracker) if world.is_main else TrackerGroup() as both:
        both.start("training", facts)
        outcome = optimize(run, state, both)
        tracker.begin("saving the policy", None)
        save_policy(run, outcome, save_dtype(config, facts))
        if world.is_main:
            facts["outcome"] = {
                "model_step": outcome.model_step,
                "stopped": outcome.stopped,
                "progress": vars(outcome.progress),
            }
            write_facts(config.out, facts)
    facts = world.broadcast(facts)
    return _report(config.out, facts)


def _sizes(run: Run) -> dict[str, Any]:
    """What followed from the options, the cache and the machine."""
    return {
        "steps": run.steps,
        "pairs": len(run.training),
        "held_out": len(run.held_out.indices) if run.held_out else 0,
        "processes": run.world.size,
        "device": run.world.device.type,
        "layout_used": run.scorer.layout_name,
        "token_budget": run.budget,
    }


def _report(out: Path, facts: dict[str, Any]) -> TrainReport:
    try:
        outcome = facts["outcome"]
        return TrainReport(
            out,
            out / "model",
            outcome["model_step"],
            None if facts["init_from"] else facts["handshake"],
            outcome["stopped"],
            Progress(**outcome["progress"]),
            from_ln_2=starts_at_ln_2(facts),
        )
    except (KeyError, TypeError) as error:
        raise OutputError(f"{out}/run.json: not as `train` wrote it ({error}); its model is in {out}/model") from error


def _budget(config: TrainConfig, scorer: Scorer, cached: CachedPairs, world: World) -> int:
    """Token slots of a micro-batch that fit in memory: rank 0's finding, so that all lay out alike."""
    checkpointing, local = config.activation_checkpointing, int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
    return world.broadcast(training_budget(scorer, cached.table, config.optimizer, checkpointing, world.device, local))
