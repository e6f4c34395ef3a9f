"""One optimizer step: its pairs, their gradients over micro-batches and processes, the update."""

import math
import operator
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial, reduce
from itertools import islice

import torch
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from minicache.models.balance import Load
from minicache.scoring.batch import Batch
from minicache.scoring.batching import Indices, by_length
from minicache.scoring.probe import own_errors
from minicache.training.losses import Objective
from minicache.training.optim import clip, rounding_of, set_learning_rate
from minicache.training.order import global_batches, shares
from minicache.training.schedules import beta_at, learning_rate
from minicache.training.speed import peak_flops, step_flops
from minicache.training.state import Run, Training
from minicache.training.validation import pair_logps, references_of


def is_logged(run: Run, step: int) -> bool:
    """Whether a step, counted from 0, has a line of its own."""
    return step % run.config.log_every == 0 or step == run.steps - 1


def beta_of(run: Run, step: int) -> float:
    """The beta of a step, counted from 0."""
    return beta_at(step, run.steps, run.objective.beta, run.config.beta_end)


def learning_rate_of(run: Run, step: int) -> float:
    """The learning rate of a step, counted from 0."""
    config = run.config
    return learning_rate(step, run.steps, config.lr, config.schedule, config.warmup, config.min_lr)


@dataclass(frozen=True)
class Part:
    """A micro-batch, with all that its losses read.

    weight: factor of the sum of its losses, (number of processes) / (pairs of the global batch): DDP and FSDP average over the
    processes. 0 for a process without pairs of its own, which still takes part in the communication.
    """

    batch: Batch
    weight: float


@dataclass(frozen=True)
class Share:
    """A rank's part of one global batch. indices: (n,) of the whole batch. parts: the micro-batches of this rank."""

    indices: Indices
    parts: list[Part]


def plan(run: Run, first_step: int) -> Iterator[Share]:
    """This rank's shares of the steps from `first_step` on; a function of cache, seed and step alone."""
    config, table, world, scorer = run.config, run.cached.table, run.world, run.scorer
    costs = scorer.layout.costs(table.lengths)
    references = partial(references_of, run.cached, run.objective.options)
    order = global_batches(run.training, config.batch_size, config.seed, first_step)
    for indices in islice(order, run.steps - first_step):
        by_rank = shares(indices, costs, world.size)
        mine = scorer.batches(table, by_rank[world.rank], run.budget, references)
        parts = [Part(made, world.size / len(indices)) for _, made in mine]
        # DDP waits for all processes once in a step, a model of shards in every forward pass.
        least = 1
        if scorer.lockstep:
            least = max(len(by_length(costs[each], run.budget, scorer.layout.pads)) for each in by_rank)
        if len(parts) < least:
            shortest = indices[[costs[indices].argmin()]]
            parts += [Part(scorer.batch(table, shortest, references), 0.0)] * (least - len(parts))
        yield Share(indices, parts)


def take_step(run: Run, training: Training, mine: Share) -> torch.Tensor:
    """Take one optimizer step; returns the gradient's norm before clipping, as a tensor: nothing waits for the device."""
    config, optimizer, scaler, step = run.config, training.optimizer, training.scaler, training.progress.step
    set_learning_rate(optimizer, learning_rate_of(run, step))
    _accumulate(run, training, replace(run.objective, beta=beta_of(run, step)), mine)
    scaler.unscale_(optimizer)
    # --max-grad-norm 0 clips nothing, but the norm is logged.
    norm = clip(optimizer, config.max_grad_norm or math.inf)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    with rounding_of(config.seed, step, run.fuses) if config.weights != "float32" else nullcontext():
        scaler.step(optimizer)
    scaler.update()
    # DDP's gradients stay in its buckets
    optimizer.zero_grad(set_to_none=not isinstance(training.forward, DistributedDataParallel))
    return norm


def _accumulate(run: Run, training: Training, objective: Objective, mine: Share) -> None:
    """Accumulate the gradients of the mean loss over one global batch; each rank adds those of its share."""
    world, forward, last = run.world, training.forward, len(mine.parts)
    # the whole distribution costs a copy of the logits
    distribution = objective.options.wpo or is_logged(run, training.progress.step)
    chosen_tokens = float(run.cached.table.token_counts[mine.indices, 0].mean())
    load = _load_of_others(run, mine) if run.scorer.balances_steps else None
    for number, part in enumerate(mine.parts, start=1):
        inputs = part.batch.to(world.device)
        # DDP reduces the gradients once, after the last part. Shards are reduced each time, or whole gradients would be kept.
        later = isinstance(forward, DistributedDataParallel) and number < last
        with forward.no_sync() if later else nullcontext():  # type: ignore[operator]
            scores = forward(inputs, distribution=distribution, balance=True)
            if scores.load:
                if number == 1:
                    own = scores.load.detached(part.weight > 0)
                    load = (own + load if load else own).over(world)
                assert load
                scores = scores.balanced(load, len(mine.indices))
            logps = pair_logps(scores, inputs, objective)
            losses = objective(logps, chosen_tokens)
            total = losses if scores.balance is None else losses + scores.balance
            with own_errors(run.scorer.model):
                training.scaler.scale(total.sum() * part.weight).backward()
        if part.weight:
            training.means.add(losses, logps, objective.beta, scores)


def _load_of_others(run: Run, mine: Share) -> Load | None:
    """The load of all parts but the first on this rank, which is known before the gradients of any need it.

    A balance over the step is not a sum over its parts. So these run once more, without gradients and without the head; the
    first does not, and with one part a rank nothing runs twice.
    """
    loads = [run.scorer.load(part.batch.to(run.world.device)).detached(part.weight > 0) for part in mine.parts[1:]]
    return reduce(operator.add, loads) if loads else None


def count_step(run: Run, training: Training, indices: Indices, seconds: float) -> int:
    """Add a step on these pairs to the run's progress; returns the number of tokens it read."""
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
