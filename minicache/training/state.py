"""The two parts of a run: what stays fixed, and what its steps change."""

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
    """The fixed part, which every step reads.

    cache: the first one, if the pairs come from several. cached: all pairs and their scores. training: the pairs to train on.
    held_out: those to validate on. steps: of the whole run. budget: token slots of a micro-batch. whole: the number of layers that
    selective checkpointing leaves whole. fuses: the update of --weights bfloat16 is compiled, on all processes.
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
    whole: int = 0
    fuses: bool = False


@dataclass
class Training:
    """The part that steps change. forward: the module to call. saver: writes checkpoints of the rest."""

    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    means: Means
    progress: Progress
    forward: nn.Module
    saver: Saver
