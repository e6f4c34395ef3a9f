"""Scoring many pairs of a table, in batches that fit in memory."""

import logging
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch

from minicache.errors import FullMemory, fits, in_words
from minicache.pairs import PairTable
from minicache.processes.devices import by_kind, empty_cache
from minicache.processes.world import World
from minicache.scoring.batch import Batch
from minicache.scoring.batching import Indices, ahead
from minicache.scoring.memory import TO_SCORE
from minicache.scoring.scorer import LookUp, PairScores, Scorer

log = logging.getLogger(__name__)

# Token slots of a forward pass. More make it no faster.
SLOTS = {"cpu": 16384, "cuda": 65536}


@dataclass
class Budget:
    """Token slots of a forward pass. Where a batch does not fit after all they are halved, and stay so for the next table."""

    slots: int


def score_table(
    scorer: Scorer,
    table: PairTable,
    indices: Indices,
    budget: Budget | int | None,
    device: torch.device,
    distribution: bool = False,
    references: LookUp | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[Indices, Batch, PairScores]]:
    """Score some pairs of a table in batches of similar length, without gradients.

    indices: (n,) of the pairs. budget: token slots of a batch; None begins with SLOTS. If a batch does not fit in memory, it is
    halved for it and the batches after it, and a `Budget` stays so. references: makes what the batches bring with them. stop: asked
    before each batch, whether to leave the rest.

    If the model is sharded, every process must call this equally often, with any number of pairs: a process without pairs left
    joins the forward passes of the others.

    Yields:
        (m,) indices of a batch into the table, the batch on the device, its scores; with `distribution` also entropy, alignment
        and balance.

    Raises:
        FullMemory: a single pair, or a batch of a sharded model, does not fit in memory.
    """
    left = np.ones(len(table), bool)
    kept = budget if isinstance(budget, Budget) else Budget(budget or by_kind(SLOTS, device))
    while len(rest := indices[left[indices]]) and not stop():
        for chosen, batch in ahead(scorer.batches(table, rest, kept.slots, references)):
            if stop():
                break
            with fits(f"a batch of {batch.input_ids.numel():,} token slots", TO_SCORE):
                moved = batch.to(device)
            if scorer.lockstep:
                scorer.lockstep.any(True)
            scores = _scores_if_they_fit(scorer, moved, distribution)
            if scores is None:
                kept.slots = min(kept.slots, _slots_to_halve(scorer, moved)) // 2
                log.debug("out of memory: batches of %d token slots from here on", kept.slots)
                break
            left[chosen] = False
            yield chosen, moved, scores
    if scorer.lockstep:
        _join_the_others(scorer, scorer.lockstep, table, device, distribution)


def _slots_to_halve(scorer: Scorer, batch: Batch) -> int:
    """The token slots of a batch that did not fit in memory.

    Raises:
        FullMemory: it cannot be made smaller, because it is a single pair or its model is sharded.
    """
    slots = batch.input_ids.numel()
    if batch.pairs == 1:
        raise FullMemory(f"a pair of {slots:,} token slots does not fit in memory; lower --max-length")
    if scorer.lockstep:
        raise FullMemory(
            f"{slots:,} token slots at once do not fit in memory, and a sharded model cannot try again; lower their number"
        )
    return slots


def _join_the_others(
    scorer: Scorer, processes: World, table: PairTable, device: torch.device, distribution: bool
) -> None:
    """Score the shortest pair of the table as long as any other process scores pairs."""
    shortest = scorer.batch(table, table.lengths.sum(1).argmin()[None]).to(device)
    while processes.any(False):
        _scores_if_they_fit(scorer, shortest, distribution)


def _scores_if_they_fit(scorer: Scorer, batch: Batch, distribution: bool) -> PairScores | None:
    """The scores of a batch without gradients; None if it does not fit in memory."""
    waits = scorer.lockstep.watch.inside() if scorer.lockstep else nullcontext()
    try:
        # not inference mode: FSDP could not use its tensors in training afterwards
        with torch.no_grad(), waits:
            scores: PairScores = scorer(batch, distribution, balance=distribution)
            return scores
    except Exception as error:
        if in_words(error) is None:
            raise
        # The error refers to the tensors that filled the memory, so it must be gone before the cache is emptied.
    empty_cache(batch.targets.device)
    return None
