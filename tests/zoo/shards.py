"""A model in shards (FSDP2) on a mesh of this one process: can its layers be found, wrapped and filled, and does it score the same?

Two real processes for every family would take too long; tests/stages/test_train.py has them for one.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from minicache.cache.schema import CachedPairs
from minicache.models import layers_of
from minicache.processes.world import World
from minicache.scoring import spread
from minicache.scoring.layout import settle_layout
from minicache.scoring.scorer import Scorer
from minicache.scoring.tables import score_table
from minicache.trackers import Silent
from tests.conftest import one_process

PAIRS = 4


@contextmanager
def in_shards(model: nn.Module, dtype: str) -> Iterator[Scorer]:
    """The scorer of a model in one shard."""
    with tempfile.TemporaryDirectory() as place:
        dist.init_process_group("gloo", init_method=f"file://{Path(place) / 'store'}", rank=0, world_size=1)
        try:
            with mock.patch.object(spread, "is_sharded", lambda parallel, world: True):
                yield spread.spread(model, dtype, "fsdp", one_process())
        finally:
            dist.destroy_process_group()


def score_in_shards(model: nn.Module, cached: CachedPairs) -> dict[str, Any]:
    """The number of layers found, and by how much the values of a few pairs differ from the cache's, after a backward pass too."""
    with in_shards(model.requires_grad_(True), "float32") as scorer:
        # its layout is not the question here
        settle_layout(scorer, cached.table, "padded", World(0, 1, torch.device("cpu")), Silent())
        scored = list(score_table(scorer, cached.table, np.arange(PAIRS), 400, torch.device("cpu")))
        off = [
            np.abs(scores.logp_mean.detach().numpy() - cached.reference.logp_mean[indices]).max()
            for indices, _, scores in scored
        ]
        scorer(scored[0][1]).logp_sum.sum().backward()
    return {"layers": len(layers_of(scorer.model)), "off": float(max(off))}
