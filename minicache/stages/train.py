"""Stage two: a reference cache -> a trained policy. Only the policy is in memory."""

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minicache import checkpoints
from minicache.budget import training_budget
from minicache.cache.reader import JoinedCaches, ReferenceCache
from minicache.cache.schema import CachedPairs
from minicache.config_train import MOVABLE, TrainConfig, flat, option
from minicache.data.batching import training_steps
from minicache.disk import writing
from minicache.distributed import World
from minicache.errors import CacheMismatch, ConfigError, ModelError, OutputError
from minicache.evaluation import settle_layout
from minicache.losses import Objective
from minicache.models import LoadedModel, checkpoint_activations, load_model, save_model
from minicache.models.load import lasting_name
from minicache.models.lora import add_lora, with_adapter
from minicache.parallel import is_sharded, spread, whole_weights
from minicache.runs import is_unused, run_facts, starts_at_ln_2, write_facts
from minicache.scoring import DTYPES, Scorer, decoder_of, resolve_dtype
from minicache.stages.checks import check, handshake
from minicache.stages.load import Sources
from minicache.stages.optimize import Outcome, optimize
from minicache.stages.pool import choose_pairs
from minicache.stages.step import Progress, Run
from minicache.trackers import Both, JsonLines, RunName, Tracker, open_trackers

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
    resume_at = world.broadcast(_resume_at(config) if world.is_main else None)
    facts = run_facts(config.out)
    if "outcome" in facts:
        tracker.note(f"{config.out}: this run is finished; nothing to resume")
        return _report(config.out, facts)
    caches = JoinedCaches([ReferenceCache(where) for where, _ in config.caches])
    cached, cache = sources.pairs(caches, config.scratch, world, tracker), caches.caches[0]
    training, held_out = choose_pairs(config, caches, cached, world, tracker, sources)
    steps = training_steps(len(training), config.batch_size, config.epochs, config.max_steps)
    state = None if resume_at is None else checkpoints.load(config.out, resume_at)
    mine = world.is_main or not is_sharded(config.parallel, world)
    policy, source, stored = _policy(config, cache, resume_at, tracker, sources) if mine else (None, "", "")
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
    with _trackers(run, facts, resume_at, tracker) if world.is_main else Both() as both:
        both.start("training", facts)
        outcome = optimize(run, state, both)
        tracker.begin("saving the policy", None)
        _save(run, outcome, _save_dtype(config, facts))
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


# --- before anything is loaded ---


def _resume_at(config: TrainConfig) -> int | None:
    """The step of the checkpoint to go on from; None to begin.

    Raises:
        OutputError: there is a run or something else at --out already. ConfigError: the run there was started with other options.
    """
    facts = run_facts(config.out)
    if not facts and config.out.exists() and not is_unused(config.out):
        raise OutputError(f"{config.out}: exists already, and is no run; name another --out or remove it")
    if not facts:
        return None
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0  # by torchrun, with the same command
    if not config.resume and not restarted:
        raise OutputError(f"{config.out}: exists already; --resume goes on with it, or name another --out")
    for name, value in flat(config).items():
        if name not in MOVABLE and value != facts.get(name):
            raise ConfigError(
                f"{config.out}: {option(name)}: this run was started with {facts.get(name)}, asked for {value}; a resumed run "
                "keeps its options: ask for the same, or name another --out"
            )
    done = checkpoints.steps(config.out)
    return done[-1] if done else None


# --- the policy ---


def _policy(
    config: TrainConfig, cache: ReferenceCache, resume_at: int | None, tracker: Tracker, sources: Sources
) -> tuple[nn.Module, str, str]:
    """The model to train, float32; what it started from; the precision its weights were stored in."""
    place = None if resume_at is None else checkpoints.place(config.out, resume_at) / "model"
    if place and not config.lora.lora_rank:
        return load_model(str(place), config.trust_remote_code).model.requires_grad_(True), "", ""
    loaded = _load(config, cache, tracker, sources)
    base, stored = loaded.model, str(next(loaded.model.parameters()).dtype).removeprefix("torch.")
    source = lasting_name(loaded.source)
    if not config.lora.lora_rank:
        return base.to(torch.float32).requires_grad_(True), source, stored
    weights = loaded.fingerprint  # before the base is made float32
    adapted = with_adapter(base, place) if place else add_lora(base.to(torch.float32), source, config.lora, config.seed)
    adapted.base_fingerprint = weights
    return adapted, source, stored


def _load(config: TrainConfig, cache: ReferenceCache, tracker: Tracker, sources: Sources) -> LoadedModel:
    source = config.init_from or config.model or cache.log.model
    tracker.begin(f"loading {source}", None)
    try:
        loaded = sources.model(source, config.trust_remote_code)
    except ModelError as error:
        if config.init_from or config.model:
            raise
        raise ModelError(f"{error} (where stage one found it; --model says where the same weights are now)") from error
    if loaded.vocabulary != cache.identity.vocabulary:
        raise CacheMismatch(
            f"{source}: vocabulary of {loaded.vocabulary}; {cache.path} was made with one of {cache.identity.vocabulary}"
        )
    if config.init_from is None and loaded.fingerprint != cache.identity.weights:
        raise CacheMismatch(
            f"{source}: weights digest {loaded.fingerprint}, but {cache.path} was made with {cache.identity.weights}. "
            "Point --model at the weights stage one used, run precompute-ref with these into another cache, "
            "or start from these on purpose with --init-from"
        )
    return loaded


# --- the run directory; rank 0 alone ---


def _trackers(run: Run, facts: dict[str, Any], resume_at: int | None, tracker: Tracker) -> Both:
    """Make the run directory with run.json and metrics.jsonl, and open what else is to hear of it.

    Raises:
        OutputError: it cannot be written, or the disk has no room for what the run will leave: better known now than at the end.
        ConfigError: a tracking library is missing.
    """
    out, config = run.config.out, run.config
    libraries = open_trackers(config.tracker, RunName(out, "minicache", out.resolve().name, resume_at), tracker.note)
    trained = sum(parameter.numel() for parameter in run.scorer.model.parameters() if parameter.requires_grad)
    kept = config.keep_last + 2 if config.save_every and config.save_every < run.steps else 0
    needed = trained * (DTYPES[_save_dtype(config, facts)].itemsize + 12 * (kept + bool(run.held_out)))
    with writing(out):
        made = not out.exists()
        out.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(out).free
        if free < needed:
            if made:
                out.rmdir()
            raise OutputError(
                f"{out}: the policy{' and its checkpoints' if kept else ''} will take {needed / 1e6:,.1f} MB, the disk has "
                f"{free / 1e6:,.1f} MB left"
            )
        if resume_at is None:
            write_facts(out, facts)
        return Both(tracker, JsonLines(out / "metrics.jsonl", resume_at), *libraries)


def _save_dtype(config: TrainConfig, facts: dict[str, Any]) -> str:
    return facts["stored_dtype"] if config.save_dtype == "auto" else config.save_dtype


def _save(run: Run, outcome: Outcome, dtype: str) -> None:
    """The policy, or the best of its checkpoints, in this precision; adapters stay float32."""
    config, out, model = run.config, run.config.out, run.scorer.model
    best, draft = checkpoints.place(out, outcome.model_step) / "model", out / ".model.saving"
    is_last = outcome.model_step == outcome.progress.step
    weights = whole_weights(model) if is_last and run.scorer.lockstep else None  # all processes take part
    if not run.world.is_main:
        return
    with writing(out):  # of a call that was killed before it could say that the run is finished
        shutil.rmtree(out / "model", ignore_errors=True)
        shutil.rmtree(draft, ignore_errors=True)
    if config.lora.lora_rank and not is_last:
        with writing(out):
            shutil.copytree(best, draft)
            draft.replace(out / "model")
        return
    model = model if is_last else load_model(str(best), config.trust_remote_code).model
    if not config.lora.lora_rank:
        model = model.to(DTYPES[dtype])
        weights = weights and {name: tensor.to(DTYPES[dtype]) for name, tensor in weights.items()}
    save_model(model, run.cache.tokenizer_dir, out / "model", weights)
