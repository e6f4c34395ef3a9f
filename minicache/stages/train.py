"""Stage two: a reference cache -> a trained policy. Only the policy is in memory."""

import json
import shutil
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from minicache.batch import padded
from minicache.cache.reader import ReferenceCache
from minicache.cache.schema import RefBlock
from minicache.cache.writer import writing
from minicache.config import TrainConfig
from minicache.data.batching import Indices, global_batches, share, training_steps
from minicache.distributed import World
from minicache.errors import CacheMismatch, ConfigError, ModelError, OutputError
from minicache.evaluation import TOLERANCE, check_reproduces, pair_logps, sample_differences
from minicache.losses import Objective
from minicache.metrics import Means
from minicache.models import LoadedModel, load_model, save_model
from minicache.optim import beta_at, learning_rate, make_optimizer
from minicache.pairs import PairTable
from minicache.scoring import Scorer, resolve_dtype
from minicache.trackers import Both, JsonLines, Tracker


@dataclass(frozen=True)
class TrainReport:
    """What a run did. first, last: the metrics of the first and the last logged step.

    noise: the largest difference the handshake found, nats a token; None for a run that began from other weights on purpose.
    """

    out: Path
    model_dir: Path
    steps: int
    seconds: float
    noise: float | None
    first: dict[str, float]
    last: dict[str, float]


@dataclass(frozen=True)
class _Run:
    """What every step needs."""

    config: TrainConfig
    world: World
    scorer: Scorer
    objective: Objective
    table: PairTable
    reference: RefBlock
    steps: int


def train(config: TrainConfig, world: World, tracker: Tracker) -> TrainReport:
    """Train a policy against cached reference logprobs and save it as a Hugging Face directory.

    Raises:
        MinicacheError: any of its kinds; the run directory is not made before everything about the request is known to fit.
    """
    objective = Objective.parse(config.loss, config.logps, config.beta, config.loss_options)
    if config.out.exists() and (not config.out.is_dir() or any(config.out.iterdir())):
        raise OutputError(f"{config.out}: exists already; name another --out or remove it")
    tracker.begin("reading the cache", None)
    cache = ReferenceCache(config.ref_cache)
    table, reference = cache.load()
    steps = training_steps(len(table), config.batch_size, config.epochs, config.max_steps)
    loaded = _load(config, cache, tracker)
    stored = next(loaded.model.parameters()).dtype
    policy = loaded.model.to(world.device, torch.float32).requires_grad_(True)
    scorer = Scorer(policy, resolve_dtype(config.dtype, world.device))
    run = _Run(config, world, scorer, objective, table, reference, steps)
    _check_batches(run)
    noise = _handshake(run, cache.identity.dtype, tracker)
    needed = stored.itemsize * sum(parameter.numel() for parameter in policy.parameters())
    with _record(run, loaded.source, needed, noise, tracker) as both:
        started = time.monotonic()
        logged = _optimize(run, both)
        seconds = time.monotonic() - started
    model_dir = config.out / "model"
    if world.is_main:
        tracker.begin("saving the policy", None)
        save_model(policy.to(stored), cache.tokenizer_dir, model_dir)
    world.barrier()
    return TrainReport(
        config.out, model_dir, steps, seconds, None if config.init_from else noise, logged[0], logged[-1]
    )


def _load(config: TrainConfig, cache: ReferenceCache, tracker: Tracker) -> LoadedModel:
    source = config.init_from or config.model or cache.log.model
    tracker.begin(f"loading {source}", None)
    try:
        loaded = load_model(source, config.trust_remote_code)
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


def _check_batches(run: _Run) -> None:
    """Refuse a loss over the whole batch where a batch is split."""
    name, config = run.objective.over_the_batch, run.config
    if name is None:
        return
    if run.world.size > 1:
        raise ConfigError(
            f"--loss {name}: sorts over the whole batch, which {run.world.size} processes would split; use one"
        )
    lengths, budget = run.table.side_lengths.max(1), config.tokens_per_micro_batch
    for batch in islice(global_batches(len(run.table), config.batch_size, config.seed), run.steps):
        if (pieces := len(share(batch, lengths, budget, 0, 1))) > 1:
            raise ConfigError(
                f"--loss {name}: sorts over the whole batch, but {len(batch)} pairs make {pieces} micro-batches of "
                f"{budget} token slots; lower --batch-size or raise --tokens-per-micro-batch"
            )


def _handshake(run: _Run, cached_dtype: str, tracker: Tracker) -> float:
    """Before the first step: does the policy reproduce the cache? Returns the largest difference, nats a token."""
    tracker.begin("handshake: re-scoring a few pairs", None)
    scored = (run.scorer, run.table, run.reference, run.world.device)
    if source := run.config.init_from:
        worst = float(sample_differences(*scored)[1].max())
        tracker.note(f"starts from {source}, not from the reference: they differ by up to {worst:.2g} nats a token")
        return worst
    tolerance = max(TOLERANCE[run.scorer.dtype], TOLERANCE[cached_dtype])
    worst = check_reproduces(*scored, tolerance, "the policy")
    tracker.note(
        f"handshake: the policy reproduces the cache within {worst:.1g} nats a token (tolerance {tolerance:g})"
    )
    return worst


def _record(run: _Run, source: str, needed: int, noise: float, tracker: Tracker) -> Both:
    """Make the run directory with run.json and metrics.jsonl; rank 0 alone has anything to tell.

    needed: bytes the saved policy will take: better known before the training than after it.
    """
    if not run.world.is_main:
        return Both()
    out = run.config.out
    options = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(run.config).items()}
    facts = {**options, "dtype": run.scorer.dtype, "steps": run.steps, "pairs": len(run.table), "started_from": source,
             "handshake": noise, "processes": run.world.size, "device": run.world.device.type}  # fmt: skip
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        (out / "run.json").write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        metrics = JsonLines(out / "metrics.jsonl")
        free = shutil.disk_usage(out).free
    if free < needed:
        shutil.rmtree(out)
        raise OutputError(f"{out}: the policy will take {needed / 1e6:,.1f} MB, the disk has {free / 1e6:,.1f} MB left")
    tracker.start("training", facts)
    return Both(metrics, tracker)


def _optimize(run: _Run, tracker: Tracker) -> list[dict[str, float]]:
    """All optimizer steps; returns the logged lines. A line holds means over the steps since the line before."""
    config, world, pairs = run.config, run.world, len(run.table)
    optimizer = make_optimizer(run.scorer.model, config.lr, config.weight_decay)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    forward = DistributedDataParallel(run.scorer) if world.size > 1 else run.scorer
    means, logged, clock = Means(world.device), [], time.monotonic()
    tracker.begin("training", run.steps * min(config.batch_size, pairs))
    for step, batch in zip(range(run.steps), global_batches(pairs, config.batch_size, config.seed), strict=False):
        lr = learning_rate(step, run.steps, config.lr, config.schedule, config.warmup, config.min_lr)
        objective = replace(run.objective, beta=beta_at(step, run.steps, config.beta, config.beta_end))
        for group in optimizer.param_groups:
            group["lr"] = lr
        _accumulate(replace(run, objective=objective), forward, batch, means)
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tracker.advance(len(batch), int(run.table.side_lengths[batch].sum()))
        if step % config.log_every == 0 or step == run.steps - 1:
            metrics, tokens = means.reduce(world)
            seconds, clock = time.monotonic() - clock, time.monotonic()
            metrics |= {
                "lr": lr,
                "beta": objective.beta,
                "grad_norm": norm.item(),
                "tokens_per_second": tokens / seconds,
            }
            metrics |= {"epoch": (step + 1) / -(-pairs // config.batch_size)}
            _check_finite(step, metrics)
            logged.append(metrics)
            tracker.log(step, metrics)
    return logged


def _accumulate(run: _Run, forward: nn.Module, batch: Indices, means: Means) -> None:
    """Gradients of the mean loss over one global batch; each rank adds those of its share.

    The loss of a share is its sum over the *global* number of pairs, times the number of processes because DDP averages.
    """
    lengths = run.table.side_lengths
    budget = run.config.tokens_per_micro_batch
    shares = share(batch, lengths.max(1), budget, run.world.rank, run.world.size)
    weight = run.world.size / len(batch)
    chosen_tokens = float(run.table.token_counts[batch, 0].mean())
    if not shares:  # fewer pairs than ranks: DDP waits for everyone, so this one takes part with a loss of weight 0
        shares, weight = [batch[:1]], 0.0
    for number, indices in enumerate(shares, start=1):
        inputs = padded(run.table.take(indices)).to(run.world.device)
        last = number == len(shares)
        with nullcontext() if last or run.world.size == 1 else forward.no_sync():  # type: ignore[operator]
            scores = forward(inputs)
            logps = pair_logps(scores, run.reference, indices, run.objective.kind)
            losses = run.objective(logps, chosen_tokens)
            (losses.sum() * weight).backward()
        if weight:
            means.add(losses, logps, run.objective.beta)
            means.add_tokens(int(lengths[indices].sum()))


def _check_finite(step: int, metrics: dict[str, float]) -> None:
    if not all(np.isfinite(metrics[name]) for name in ("loss", "grad_norm")):
        raise ModelError(
            f"step {step}: loss {metrics['loss']}, gradient norm {metrics['grad_norm']}: the run has diverged; "
            "expected finite numbers. Try a lower --lr or --beta; nothing was saved"
        )
