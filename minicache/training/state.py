"""What a run is, how far it is, and what its steps change."""

from dataclasses import dataclass, field

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
class Progress:
    """How far a run is.

    step: optimizer steps done. seconds, tokens, flops: since the last log line; total_seconds, total_tokens: of the run.
    validated, saved: the steps of the last validation and of the last checkpoint. best, best_step, validation: loss, step and
    metrics of the best one. waited: validations since the last whose loss was lower than `anchor` by --min-gain. pending:
    validated metrics for the next line.
    first, last: logged lines; last_step: which the last is of. warned: of --max-kl.
    """

    step: int = 0
    seconds: float = 0.0
    tokens: int = 0
    flops: float = 0.0
    total_seconds: float = 0.0
    total_tokens: int = 0
    validated: int = -1
    saved: int = -1
    best: float | None = None
    best_step: int | None = None
    validation: dict[str, float] | None = None
    waited: int = 0
    anchor: float | None = None
    pending: dict[str, float] = field(default_factory=dict)
    warned: bool = False
    first: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)
    last_step: int = 0


@dataclass
class Training:
    """What steps change, and a checkpoint holds."""

    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    means: Means
    progress: Progress
    forward: nn.Module
    saver: Saver
