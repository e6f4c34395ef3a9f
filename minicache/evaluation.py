"""Cached pairs scored by a model: metrics of a policy, and the check that a model reproduces its cache."""

from collections.abc import Iterator

import numpy as np
import torch

from minicache.batch import padded
from minicache.cache.schema import RefBlock
from minicache.data.batching import Indices, by_length
from minicache.distributed import World
from minicache.errors import ConfigError, HandshakeError
from minicache.losses import Logps, Objective
from minicache.metrics import Means
from minicache.pairs import PairTable
from minicache.scoring import PairScores, Scorer
from minicache.trackers import Tracker

SAMPLE = 8
# Largest difference of a pair's mean logprob, nats a token, that rounding explains. Batch shapes differ between the stages, and
# with them the order of sums; float32 noise is around 1e-6, that of half precisions is of the size of their last bits.
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}


def score_table(
    scorer: torch.nn.Module, table: PairTable, indices: Indices, budget: int, device: torch.device
) -> Iterator[tuple[Indices, torch.Tensor, PairScores]]:
    """Score some pairs of a table in batches of similar length, without gradients.

    Yields:
        the batch's indices into the table, the places (K,) of `token_logps` in those pairs' concatenated tokens, the scores.
    """
    for chosen in by_length(table.side_lengths[indices].max(1), budget):
        batch = padded(table.take(indices[chosen])).to(device)
        with torch.inference_mode():
            yield indices[chosen], batch.places, scorer(batch)


def evaluate_policy(
    scorer: Scorer,
    table: PairTable,
    reference: RefBlock,
    objective: Objective,
    budget: int,
    world: World,
    tracker: Tracker,
) -> dict[str, float]:
    """Mean metrics (see metrics.py) of a policy over all pairs of a cache, shared among the processes.

    Raises:
        ConfigError: the loss sorts over a batch, and a data set is no batch.
    """
    if name := objective.over_the_batch:
        raise ConfigError(
            f"--loss {name}: sorts over a training batch, so it says nothing of a data set; try --loss sigmoid"
        )
    means, chosen_tokens = Means(world.device), float(table.token_counts[:, 0].mean())
    tracker.begin("evaluating", len(table))
    mine = np.arange(world.rank, len(table), world.size)
    for indices, _, scores in score_table(scorer, table, mine, budget, world.device):
        logps = pair_logps(scores, reference, indices, objective.kind)
        means.add(objective(logps, chosen_tokens), logps, objective.beta)
        tracker.advance(len(indices) * world.size, int(table.side_lengths[indices].sum()) * world.size)
    return means.reduce(world)[0]


def pair_logps(scores: PairScores, reference: RefBlock, indices: Indices, kind: str) -> Logps:
    """Policy's and reference's logprobs of a batch side by side, as means or as sums (mean x tokens): the same for both."""
    ref = torch.from_numpy(reference.logp_mean[indices]).to(scores.logp_sum.device)
    if kind == "mean":
        return Logps(scores.logp_mean, ref, scores.token_count, averaged=True)
    return Logps(scores.logp_sum, ref * scores.token_count, scores.token_count, averaged=False)


def sample_differences(
    scorer: Scorer, table: PairTable, reference: RefBlock, device: torch.device
) -> tuple[Indices, np.ndarray]:
    """Re-score a few pairs spread over the table; (n,) indices and (n, 2) |difference| of mean logprobs, nats a token."""
    sample = np.unique(np.linspace(0, len(table) - 1, SAMPLE).astype(np.int64))
    differences = np.zeros((len(sample), 2))
    # one at a time: another batch shape than stage one's, as in training
    for indices, _, scores in score_table(scorer, table, sample, 1, device):
        difference = np.abs(scores.logp_mean.double().cpu().numpy() - reference.logp_mean[indices])
        differences[np.searchsorted(sample, indices)] = difference
    return sample, differences


def check_reproduces(
    scorer: Scorer, table: PairTable, reference: RefBlock, device: torch.device, tolerance: float, what: str
) -> float:
    """The handshake: the model must give what the cache says. Returns the largest difference, nats a token.

    Raises:
        HandshakeError: naming the pairs that differ, and by how much.
    """
    sample, differences = sample_differences(scorer, table, reference, device)
    worst = differences.max(1)
    bad = ~(worst <= tolerance)  # a NaN is bad too
    if bad.any():
        listed = ", ".join(
            f"pair {pair} by {by:.2g}" for pair, by in list(zip(sample[bad], worst[bad], strict=True))[:4]
        )
        raise HandshakeError(
            f"{what} does not reproduce the cache: {int(bad.sum())} of {len(sample)} pairs re-scored differ by more than "
            f"{tolerance:g} nats a token ({listed}). Expected the same weights, config and code as when the cache was made"
        )
    return float(worst.max())
