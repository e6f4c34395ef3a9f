"""Scoring many pairs of a table, in batches that fit in memory."""

from collections.abc import Iterator

import numpy as np
import torch

from minicache.errors import ModelError
from minicache.pairs import PairTable
from minicache.scoring.batch import Batch
from minicache.scoring.batching import Indices, ahead
from minicache.scoring.scorer import PairScores, Scorer

SLOTS = {"cpu": 16384, "cuda": 65536}  # of a forward pass: more at once makes it no faster


def score_table(
    scorer: Scorer,
    table: PairTable,
    indices: Indices,
    budget: int | None,
    device: torch.device,
    distribution: bool = False,
) -> Iterator[tuple[Indices, Batch, PairScores]]:
    """Score some pairs of a table in batches of similar length, without gradients.

    budget: token slots of a batch; None begins with as many as can make it faster. Where a batch does not fit in memory, it
    and those after it are made half as large. Of a model in shards every process must call this as often as the others, with
    few pairs, many or none: where one has no more, it takes part in the others' forward passes.

    Yields:
        the batch's indices into the table, the batch, its scores (see `Scorer` for `distribution`).

    Raises:
        ModelError: a single pair does not fit in memory.
    """
    left, budget = np.ones(len(table), bool), budget or SLOTS[device.type]
    while len(rest := indices[left[indices]]):
        for chosen, batch in ahead(scorer.batches(table, rest, budget)):
            moved = batch.to(device)
            if scorer.lockstep:
                scorer.lockstep.any(True)
            scores = _scores_if_they_fit(scorer, moved, distribution)
            if scores is None:
                slots = moved.input_ids.numel()
                if len(chosen) == 1:
                    raise ModelError(f"a pair of {slots:,} token slots does not fit in memory; lower --max-length")
                if scorer.lockstep:
                    raise ModelError(
                        f"{slots:,} token slots at once do not fit in memory, and shards cannot try again; lower their number"
                    )
                budget = min(budget, slots) // 2
                break
            left[chosen] = False
            yield chosen, moved, scores
    if scorer.lockstep:
        shortest = scorer.layout.make(table, table.lengths.sum(1).argmin()[None]).to(device)
        while scorer.lockstep.any(False):
            _scores_if_they_fit(scorer, shortest, distribution)


def _scores_if_they_fit(scorer: Scorer, batch: Batch, distribution: bool) -> PairScores | None:
    try:
        with torch.no_grad():  # not inference mode, whose tensors FSDP could not use in training afterwards
            return scorer(batch, distribution)
    except torch.OutOfMemoryError:
        pass  # the error holds on to what filled the memory: it must be gone before the next attempt
    torch.cuda.empty_cache()
    return None
