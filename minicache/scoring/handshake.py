"""The check that a model reproduces the values in a cache."""

import numpy as np
import torch

from minicache.cache.schema import CachedPairs
from minicache.errors import HandshakeError
from minicache.scoring.batching import Indices
from minicache.scoring.scorer import Scorer
from minicache.scoring.tables import score_table

SAMPLE = 8


def sample_differences(scorer: Scorer, cached: CachedPairs, device: torch.device) -> tuple[Indices, np.ndarray]:
    """Re-score a few pairs spread over the cache; (n,) indices and (n, 2) |difference| of mean logprobs, nats a token."""
    sample = np.unique(np.linspace(0, len(cached.table) - 1, SAMPLE).astype(np.int64))
    differences = np.zeros((len(sample), 2))
    # one at a time: another batch shape than stage one's, as in training
    for indices, _, scores in score_table(scorer, cached.table, sample, 1, device):
        difference = np.abs(scores.logp_mean.double().cpu().numpy() - cached.reference.logp_mean[indices])
        differences[np.searchsorted(sample, indices)] = difference
    return sample, differences


def check_reproduces(scorer: Scorer, cached: CachedPairs, device: torch.device, tolerance: float, what: str) -> float:
    """The handshake: the model must give what the cache says. Returns the largest difference, nats a token.

    Raises:
        HandshakeError: naming the pairs that differ, and by how much.
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
            f"{tolerance:g} nats a token ({listed}). Expected the same weights, config and code as when the cache was made"
        )
    return float(worst.max())
