"""This project's two stages as a contestant, with the functions that the stages use."""

from functools import partial

import numpy as np

from benchmarks.case import Case, Optimizer, twin
from minicache.cache.schema import CachedPairs, RefBlock
from minicache.processes.world import World
from minicache.scoring.batching import Indices
from minicache.scoring.layout import settle_layout
from minicache.scoring.scorer import Scorer
from minicache.scoring.tables import score_table
from minicache.trackers import Silent
from minicache.training.validation import pair_logps, references_of


class Ours:
    """A `Contestant`."""

    def __init__(self, case: Case, optimizer: Optimizer) -> None:
        self.case, self.optimizer = case, optimizer
        self.scorer = Scorer(twin(case.model), case.dtype)
        settle_layout(self.scorer, case.table, case.layout, World(0, 1, case.device), Silent())

    def reference(self) -> np.ndarray:
        """(N, 2) mean logprobs, nats per token, which later steps use."""
        case = self.case
        means = np.zeros((len(case.table), 2), np.float32)
        for indices, _, scores in score_table(self.scorer, case.table, case.everything, case.budget, case.device):
            means[indices] = scores.logp_mean.cpu().numpy()
        self.cached = CachedPairs(case.table, RefBlock(means, case.table.token_counts))
        return means

    def step(self, indices: Indices) -> None:
        """One optimizer step on these pairs."""
        self.accumulate(indices)
        self.optimizer.step()

    def accumulate(self, indices: Indices) -> None:
        """Accumulate the gradients of the mean loss of these pairs."""
        case = self.case
        references = partial(references_of, self.cached, case.objective.options)
        for _, batch in self.scorer.batches(case.table, indices, case.budget, references):
            moved = batch.to(case.device)
            # with the distribution, because training logs the entropy
            scores = self.scorer(moved, distribution=True)
            logps = pair_logps(scores, moved, case.objective)
            (case.objective(logps, 1.0).sum() / len(indices)).backward()
