"""One of several processes that compare what a step of shards allocates with its count: OUT is the file for the ratios."""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from minicache.models import checkpoint_activations
from minicache.processes.world import World, join_world, leave_world
from minicache.scoring.counting import counted_pass
from minicache.scoring.masks import Windows
from minicache.scoring.memory import How, need_of
from minicache.scoring.spread import spread
from minicache.training.optim import make_optimizer
from minicache.training.shards import trainable
from tests.processes.test_sharded_memory import CASES
from tests.scoring.test_memory import PAIRS, allocated, pairs, scorer_of, step


def foreseen_and_allocated(
    world: World, family: str, rank: int, dtype: str, checkpointing: bool, training: bool
) -> float:
    """Bytes of a step at its peak as its shapes say, over those that the second real step took."""
    # of the same seed on every rank; rank 0's is spread
    model = scorer_of(family, rank).model
    if not training:
        model.requires_grad_(False)
    scorer = spread(model if world.is_main else None, dtype, "fsdp", world)
    del model
    scorer.use_layout("packed", Windows.read(scorer.model.config, 80))
    make, table = scorer.layout.make, pairs()
    one, two = (make(table, np.arange(count)) for count in (1, 2))
    how = How(training=training, checkpointing=checkpointing, sharded=True)
    need = need_of(scorer.outline, counted_pass(scorer.outline, one, two, how), "adamw" if training else None)
    if checkpointing:
        checkpoint_activations(scorer.model)
    optimizer = make_optimizer(scorer, "adamw", 1e-4, 0.0) if training else None

    def run() -> None:
        if optimizer:
            step(trainable(scorer, world), table, optimizer)
        else:
            with torch.no_grad():
                scorer(make(table, np.arange(PAIRS)), distribution=True)

    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    expected = need.state + need.weights + need.passes.bytes(PAIRS * need.passes.slots)
    return expected / (need.weights + need.optimizer + allocated(profiled))


world = join_world("cpu")
found = [foreseen_and_allocated(world, *case) for case in CASES]
if world.is_main:
    Path(sys.argv[1]).write_text(json.dumps(found))
leave_world()
