"""Stage two: a reference cache -> a trained policy. Only the policy is in memory."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path

from minicache.cache.reader import JoinedCaches, ReferenceCache
from minicache.errors import OutputError
from minicache.models import checkpoint_activations
from minicache.models.balance import has_routers, weight_before
from minicache.options.dictionaries import flat
from minicache.options.objective import starts_at_ln_2
from minicache.options.train import TrainConfig
from minicache.pairs import PairTable
from minicache.processes.signals import StopFlag
from minicache.processes.world import World
from minicache.reports.held_out import learned, words_on_run
from minicache.scoring.budget import layers_that_fit, training_budget
from minicache.scoring.compiled import compile_layers
from minicache.scoring.dtype import agreed_dtype
from minicache.scoring.foresight import Held, require_room
from minicache.scoring.layout import settle_layout
from minicache.scoring.loading import Sources
from minicache.scoring.scorer import Scorer
from minicache.scoring.spread import is_sharded, shards_of, spread
from minicache.trackers import Tracker, TrackerGroup
from minicache.training import checkpoints
from minicache.training.checks import agree, check, handshake, require
from minicache.training.lock import RunLock
from minicache.training.loop import optimize
from minicache.training.losses import Objective
from minicache.training.optim import agreed_fusing
from minicache.training.order import training_steps
from minicache.training.pinned import pins, with_pins
from minicache.training.policy import Policy, load_policy, quantization_for
from minicache.training.pool import choose_pairs
from minicache.training.progress import Progress
from minicache.training.resuming import Begun, as_begun, find_begun
from minicache.training.run_directory import RunRecord, holds_model, write_record
from minicache.training.saving import open_run, save_dtype, save_policy
from minicache.training.state import Run
from minicache.training.validation import require_per_token

log = logging.getLogger(__name__)

FROM_DISK = Sources()


@dataclass(frozen=True)
class TrainReport:
    """The result of a run.

    model_step: optimizer steps behind the saved model. noise: the largest difference that the handshake found, nats per token;
    None for a run that began from other weights on purpose. stopped: the reason for an early end, or None. from_ln_2: whether
    the loss is ln 2 where policy and reference agree. words: what the run came to, where there is something to say. learned:
    whether the policy is another than the model it started from.
    """

    out: Path
    model_dir: Path
    model_step: int
    noise: float | None
    stopped: str | None
    progress: Progress
    from_ln_2: bool
    words: list[str]
    learned: bool


def train(config: TrainConfig, world: World, tracker: Tracker, sources: Sources = FROM_DISK) -> TrainReport:
    """Train a policy against cached reference logprobs and save it as a Hugging Face directory, or as an adapter.

    sources: reads pairs and model; the run changes the model that it gets.

    Raises:
        MinicacheError: of any kind. The run directory is made only after the whole request was checked.
        KeyboardInterrupt: on SIGINT or SIGTERM, after the state was saved.
    """
    with RunLock(config.out) as lock:
        world.first(lock.require)
        return train_locked(config, lock, world, tracker, sources)


def train_locked(config: TrainConfig, lock: RunLock, world: World, tracker: Tracker, sources: Sources) -> TrainReport:
    """As `train`, in a run directory that rank 0 holds the lock of, or that does not exist yet."""
    sharded = is_sharded(config.parallel, world)
    config = replace(config, dtype=agreed_dtype(config.dtype, world, tracker.note, sharded))
    begun = world.first(lambda: _begun(config))
    if begun and begun.record.outcome:
        tracker.note(f"{config.out}: this run is finished; nothing to resume")
        return _report(config.out, begun.record)
    config = as_begun(config, begun.record) if begun else config.settled()
    world.each(lambda: require(config, world.device, world.size))
    commits = world.first(lambda: pins(config))
    config = with_pins(config, commits)
    step = begun.step if begun else None
    run, policy = _prepare(config, begun, world, tracker, sources)
    state = None if step is None else world.each(lambda: checkpoints.load(config.out, step))
    agree(run, state)
    world.each(lambda: check(run, state))
    record = begun.record if begun and state else _record(run, policy, handshake(run, tracker))
    _save_memory_and_time(run)
    opened = world.each(lambda: open_run(run, record, step, lock, tracker) if world.is_main else TrackerGroup())
    with opened as trackers:
        trackers.start("training", record.flat)
        outcome = optimize(run, state, trackers)
        tracker.begin("saving the policy", None)
        # no checkpoint holds the last steps: a request to stop waits for the policy, and a later one does not
        with world.watch.saving(), StopFlag() as stop:
            save_policy(run, outcome, save_dtype(config, record))
            record = world.first(lambda: _finished(config, replace(record, outcome=outcome)))
    if stop:
        raise KeyboardInterrupt(f"the run is finished: its policy is in {config.out / 'model'}")
    return _report(config.out, record)


def _begun(config: TrainConfig) -> Begun | None:
    """The run to resume; None to begin one. Raises OutputError: it cannot be resumed, or is finished and its policy is gone."""
    begun = find_begun(config)
    if begun and begun.record.outcome and not holds_model(config.out):
        raise OutputError(
            f"{config.out}: this run is finished, but its policy in {config.out / 'model'} is gone; expected it there: put it "
            "back, or train into another directory"
        )
    return begun


def _finished(config: TrainConfig, record: RunRecord) -> RunRecord:
    """The record of a finished run, written."""
    write_record(config.out, record)
    return record


def _prepare(
    config: TrainConfig, begun: Begun | None, world: World, tracker: Tracker, sources: Sources
) -> tuple[Run, Policy]:
    """The run, with pairs and model in memory, and its policy without the model, which the run's scorer holds."""
    objective = Objective.parse(config.loss, config.logps, config.beta, config.loss_options)
    caches = world.each(lambda: _open_caches(config))
    cached = sources.pairs(caches, config.scratch, world, tracker)
    training, held_out = choose_pairs(config, caches, cached, world, tracker, sources)
    if sources is FROM_DISK and not begun:
        _require_room(config, caches.caches[0], cached.table, world)
    scorer, policy = _load(config, caches.caches[0], begun, world, tracker, sources)
    _weigh_balance(scorer, config, begun, tracker)
    before = begun.record.layout_used if begun else ""
    settle_layout(scorer, cached.table, config.layout, world, tracker, before)
    kept = begun.record.token_budget if begun else None
    budget = (
        config.tokens_per_micro_batch
        or kept
        or training_budget(scorer, cached.table, config.optimizer, config.checkpoints_layers, world, tracker)
    )
    whole = 0
    if config.selective_checkpointing:
        whole = layers_that_fit(scorer, cached.table, config.optimizer, budget, world, tracker)
    run = Run(
        config=config,
        world=world,
        scorer=scorer,
        objective=objective,
        cache=caches.caches[0],
        cached=cached,
        training=training,
        held_out=held_out,
        steps=training_steps(len(training), config.batch_size, config.epochs, config.max_steps),
        budget=budget,
        whole=whole,
        fuses=agreed_fusing(config.weights, world, tracker.note),
    )
    log.debug(
        "%d pairs to train on, %d to validate on, %d steps; layout %s, %d token slots a micro-batch",
        len(training),
        len(held_out.indices) if held_out else 0,
        run.steps,
        scorer.layout_name,
        run.budget,
    )
    return run, policy


def _open_caches(config: TrainConfig) -> JoinedCaches:
    """Raises CacheMismatch: they do not go together, or lack what the loss needs. CacheError: one cannot be opened."""
    caches = JoinedCaches([ReferenceCache(where) for where, _ in config.caches])
    require_per_token(caches.caches[0], config.loss_options)
    return caches


def _weigh_balance(scorer: Scorer, config: TrainConfig, begun: Begun | None, tracker: Tracker) -> None:
    """Apply --balance. A run that records no weight is one without experts, or of before there was the option."""
    if config.balance is None:
        if begun:
            scorer.weigh_balance(weight_before(scorer.model))
    elif not scorer.weigh_balance(config.balance) and config.balance:
        tracker.note(
            f"--balance {config.balance:g}: not used, the model has no experts whose routers transformers records"
        )


def _require_room(config: TrainConfig, cache: ReferenceCache, table: PairTable, world: World) -> None:
    """Raises FullMemory: the policy, or one pass over the longest pair, clearly does not fit."""
    if config.lora.continue_adapter:
        return
    held = Held(
        dtype=config.dtype,
        lora=config.lora,
        quantization=world.each(lambda: quantization_for(config, cache)),
        trained=True,
        optimizer=config.optimizer,
        weights=config.weights,
        shards=shards_of(config.parallel, world),
    )
    source = config.init_from or config.model or cache.log.model
    # a budget that is given is tried
    pairs = None if config.tokens_per_micro_batch else table
    require_room(source, config.trust_remote_code, held, world, pairs, config.checkpoints_layers)


def _load(
    config: TrainConfig, cache: ReferenceCache, begun: Begun | None, world: World, tracker: Tracker, sources: Sources
) -> tuple[Scorer, Policy]:
    """The policy on every process: whole, or in shards, in which case rank 0 alone reads it."""
    is_mine = world.is_main or not is_sharded(config.parallel, world)
    step = begun.step if begun else None
    policy = world.each(lambda: load_policy(config, cache, step, tracker, sources) if is_mine else Policy(None))
    scorer = spread(policy.model, config.dtype, config.parallel, world, config.weights)
    return scorer, replace(policy, model=None)


def _record(run: Run, policy: Policy, worst: float) -> RunRecord:
    """The record of a new run. worst: the largest difference of the handshake, nats per token."""
    weight = {"balance": run.scorer.balance_weight} if has_routers(run.scorer.model) else {}
    return RunRecord(
        options={**flat(run.config), **weight},
        started_from=policy.started_from,
        stored_dtype=policy.stored_dtype,
        handshake=worst,
        steps=run.steps,
        pairs=len(run.training),
        held_out=len(run.held_out.indices) if run.held_out else 0,
        processes=run.world.size,
        device=run.world.device.type,
        layout_used=run.scorer.layout_name,
        token_budget=run.budget,
        date=run.cache.identity.date or None,
        template_args=run.cache.identity.template_args or None,
        quantization=policy.quantization or None,
    )


def _save_memory_and_time(run: Run) -> None:
    """Apply --activation-checkpointing or --selective-checkpointing, and --compile, to the model."""
    if run.config.checkpoints_layers:
        checkpoint_activations(run.scorer.model, run.whole)
    if run.config.compile:
        compile_layers(run.scorer)


def _report(out: Path, record: RunRecord) -> TrainReport:
    assert record.outcome
    return TrainReport(
        out=out,
        model_dir=out / "model",
        model_step=record.outcome.model_step,
        noise=None if record.options["init_from"] else record.handshake,
        stopped=record.outcome.stopped,
        progress=record.outcome.progress,
        from_ln_2=starts_at_ln_2(record.options),
        words=words_on_run(record.flat),
        learned=learned(record.flat),
    )
