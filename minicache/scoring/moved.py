"""By how much the logprobs of a few pairs of a cache differ between two models."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from minicache.cache.reader import ReferenceCache
from minicache.models.precision import hold_for
from minicache.pairs import PairTable
from minicache.scoring.handshake import spread_sample
from minicache.scoring.scorer import Scorer
from minicache.scoring.tables import score_table


@dataclass(frozen=True)
class Moved:
    """How far mean logprobs moved, nats per token: on average and at most, over the sides of some pairs of a cache."""

    mean: float
    most: float
    pairs: int
    ref_cache: str


@dataclass(frozen=True)
class Scored:
    """Mean logprobs, (N, 2), nats per token, that a model gives some pairs of a cache in the cache's precision."""

    cache: ReferenceCache
    pairs: PairTable
    means: NDArray[np.float64]

    @classmethod
    def by(cls, model: nn.Module, cache: ReferenceCache, device: torch.device) -> "Scored":
        """The scores of a few pairs, spread over the cache. Raises CacheError: they cannot be read."""
        pairs = PairTable.from_pairs(
            [cache[int(index)].pair for index in spread_sample(len(cache))], cache.identity.token_dtype
        )
        return cls(cache, pairs, _means(model, pairs, cache.identity.dtype, device))

    def moved_by(self, model: nn.Module, device: torch.device) -> Moved:
        """The distance of another model's scores of the same pairs from these."""
        by = np.abs(_means(model, self.pairs, self.cache.identity.dtype, device) - self.means)
        model.cpu()
        return Moved(mean=float(by.mean()), most=float(by.max()), pairs=len(by), ref_cache=str(self.cache.path))


def _means(model: nn.Module, table: PairTable, dtype: str, device: torch.device) -> NDArray[np.float64]:
    """(N, 2) mean logprobs, nats per token. The model is then held for such passes on the device."""
    scorer = Scorer(hold_for(model, device, dtype), dtype)
    means = np.zeros((len(table), 2))
    for indices, _, scores in score_table(scorer, table, np.arange(len(table)), None, device):
        means[indices] = scores.logp_mean.cpu().double().numpy()
    return means
