"""One optimizer step: the pairs it takes, their gradients over micro-batches and processes, the update."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import islice

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from minicache.batch import Batch
from minicache.cache.reader import ReferenceCache
from minicache.cache.schema import CachedPairs
from minicache.checkpoints import Saver
from minicache.config_train import TrainConfig
from minicache.data.batching import Indices, Mixture, by_length, global_batches, shares
from minicache.distributed import World
from minicache.evaluation import EvalSet, pair_logps
from minicache.losses import Objective
from minicache.metrics import Means
from minicache.optim import beta_at, learning_rate
from minicache.scoring import Scorer
from minicache.speed import peak_flops, step_flops


@dataclass(frozen=True)
class Run:
    """What every step needs. cache: the first, if the pairs are of several. training: those to train on. held_out: to validate on.

    steps: of the whole run. budget: token slots of a micro-batch.
    """

    config: TrainConfig
    world: World
    scorer: Scorer
    objective: Objective
    cache: ReferenceCache
    cached: CachedPairs
    training: Mixture
    held_out: EvalSet | None
    steps: int
    budget: int


@dataclass
class Progress:
    """How far a run is.

    step: optimizer steps done. seconds, tokens, flops: since the last log line; total_seconds, total_tokens: of the run.
    validated, saved: the steps of the last validation and of the last checkpoint. best, best_step, validation: loss, step and
    metrics of the best one. waited: validations since the last whose loss was lower than `anchor` by --min-gain. pending:
    validated metrics for the next line.
    first, last: logged lines; last_step: which the last is of. warned: of --max-kl.
    """

    step: int = 0
    seconds: float = 0.0
    tokens: int = 0
    flops: float = 0.0
    total_seconds: float = 0.0
    total_tokens: int = 0
    validated: int = -1
    saved: int = -1
    best: float | None = None
    best_step: int | None = None
    validation: dict[str, float] | None = None
    waited: int = 0
    anchor: float | None = None
    pending: dict[str, float] = field(default_factory=dict)
    warned: bool = False
    first: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)
    last_step: int = 0


@dataclass
class Training:
    """What steps change, and a checkpoint holds."""

    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    means: Means
    progress: Progress
    forward: nn.Module
    saver: Saver


def beta_of(run: Run, step: int) -> float:
    return beta_at(step, run.steps, run.config.beta, run.config.beta_end)


@dataclass(frozen=True)
class Part:
    """A micro-batch. weight: of the sum of its losses: over the *global* number of pairs, times the number of processes because
    DDP and FSDP average. 0: a process without pairs of its own only takes part.
    """

    indices: Indices
    batch: Batch
    weight: float


@dataclass(frozen=True)
class Share:
    """A rank's part of one global batch. indices: (n,) of the whole batch. parts: the micro-batches of this rank."""

    indices: Indices
    parts: list[Part]


def plan(run: Run, first_step: int) -> Iterator[Share]:
    """The steps still to come, laid out in memory; a function of cache, seed and step alone."""
    config, table, world, scorer = run.config, run.cached.table, run.world, run.scorer
    costs = scorer.layout.costs(table.lengths)
    order = global_batches(run.training, config.batch_size, config.seed, first_step)
    for indices in islice(order, run.steps - first_step):
        by_rank = shares(indices, costs, world.size)
        mine = scorer.batches(table, by_rank[world.rank], run.budget)
        parts = [Part(chosen, made, world.size / len(indices)) for chosen, made in mine]
        least = 1  # DDP waits for everyone once a step; shards in every forward pass
        if scorer.lockstep:
            least = max(len(by_length(costs[each], run.budget, scorer.layout.pads)) for each in by_rank)
        if len(parts) < least:
            shortest = indices[[costs[indices].argmin()]]
            parts += [Part(shortest, scorer.layout.make(table, shortest), 0.0)] * (least - len(parts))
        yield Share(indices, parts)


def take_step(run: Run, training: Training, mine: Share) -> torch.Tensor:
    """One optimizer step; returns the gradient's norm before clipping, a tensor, so that nothing waits for it."""
    config, optimizer, scaler, step = run.config, training.optimizer, training.scaler, training.progress.step
    lr = learning_rate(step, run.steps, config.lr, config.schedule, config.warmup, config.min_lr)
    for group in optimizer.param_groups:
        group["lr"] = lr
    _accumulate(run, training, replace(run.objective, beta=beta_of(run, step)), mine)
    scaler.unscale_(optimizer)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return norm


def _accumulate(run: Run, training: Training, objective: Objective, mine: Share) -> None:
    """Gradients of the mean loss over one global batch; each rank adds those of its share."""
    world, forward, last = run.world, training.forward, len(mine.parts)
    chosen_tokens = float(run.cached.table.token_counts[mine.indices, 0].mean())
    for number, part in enumerate(mine.parts, start=1):
        inputs = part.batch.to(world.device)
        # shards are reduced every time: to wait would keep whole gradients
        later = isinstance(forward, DistributedDataParallel) and number < last
        with forward.no_sync() if later else nullcontext():  # type: ignore[operator]
            scores = forward(inputs, distribution=True)
            logps = pair_logps(scores, inputs, run.cached, part.indices, objective)
            losses = objective(logps, chosen_tokens)
            total = losses if scores.balance is None else losses + scores.balance
            training.scaler.scale(total.sum() * part.weight).backward()
        if part.weight:
            training.means.add(losses, logps, objective.beta, scores)


def count_step(run: Run, training: Training, indices: Indices, seconds: float) -> int:
    """Keep account of a step on these pairs; returns the tokens it read."""
    progress, table = training.progress, run.cached.table
    tokens = int(table.side_lengths[indices].sum())
    progress.step += 1
    progress.seconds += seconds
    progress.total_seconds += seconds
    progress.tokens += tokens
    progress.total_tokens += tokens
    if peak_flops(run.world.device, run.config.dtype):
        progress.flops += step_flops(run.scorer.model, table, indices)
    return tokens
