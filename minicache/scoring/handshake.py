"""The check that a model reproduces the values in a cache."""

import logging

import numpy as np
import torch

from minicache.cache.schema import CachedPairs
from minicache.errors import HandshakeError
from minicache.scoring.batching import Indices
from minicache.scoring.scorer import Scorer
from minicache.scoring.tables import score_table

log = logging.getLogger(__name__)

# Pairs that are scored again.
SAMPLE = 8


def spread_sample(pairs: int) -> Indices:
    """(n,) The indices of at most SAMPLE pairs, spread over so many."""
    return np.unique(np.linspace(0, pairs - 1, SAMPLE).astype(np.int64))


def sample_differences(scorer: Scorer, cached: CachedPairs, device: torch.device) -> tuple[Indices, np.ndarray]:
    """Score a few pairs, spread over the cache, again.

    Returns:
        (n,) indices of the pairs; (n, 2) float64 |difference| of the mean logprobs, nats per token.
    """
    sample = spread_sample(len(cached.table))
    differences = np.zeros((len(sample), 2))
    # one at a time, so that batches have other shapes than in stage one, as in training
    for indices, _, scores in score_table(scorer, cached.table, sample, 1, device):
        difference = np.abs(scores.logp_mean.cpu().double().numpy() - cached.reference.logp_mean[indices])
        differences[np.searchsorted(sample, indices)] = difference
        log.debug("pair %d: chosen and rejected differ by %.3g and %.3g nats per token", indices[0], *difference[0])
    return sample, differences


def check_reproduces(scorer: Scorer, cached: CachedPairs, device: torch.device, tolerance: float, what: str) -> float:
    """The largest difference of a mean logprob, nats per token, between the model and the cache, on a sample of pairs.

    what: the name of the model in the error.

    Raises:
        HandshakeError: a difference exceeds the tolerance; it lists pairs and differences.
    """
    sample, differences = sample_differences(scorer, cached, device)
    worst = differences.max(1)
    bad = ~(worst <= tolerance)  # a NaN is bad too
    if bad.any():
        listed = ", ".join(
            f"pair {pair} by {by:.2g}" for pair, by in list(zip(sample[bad], worst[bad], strict=True))[:4]
        )
        raise HandshakeError(
            f"{what} does not reproduce the cache: {int(bad.sum())} of {len(sample)} pairs re-scored differ by more than "
            f"{tolerance:g} nats per token ({listed}). Expected the same weights, config and code as when the cache was made"
        )
    return float(worst.max())
