"""What a run is, and what its steps change."""

from dataclasses import dataclass

import torch
from torch import nn

from minicache.cache.reader import ReferenceCache
from minicache.cache.schema import CachedPairs
from minicache.options.train import TrainConfig
from minicache.processes.world import World
from minicache.scoring.scorer import Scorer
from minicache.training.checkpoints import Saver
from minicache.training.losses import Objective
from minicache.training.metrics import Means
from minicache.training.order import Mixture
from minicache.training.progress import Progress
from minicache.training.validation import EvalSet


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
class Training:
    """What steps change, and a checkpoint holds."""

    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    means: Means
    progress: Progress
    forward: nn.Module
    saver: Saver
