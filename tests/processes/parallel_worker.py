"""One of several processes that run the same stages one after another: python -m tests.processes.parallel_worker JOBS.json."""

import json
import sys
from pathlib import Path

from minicache.options.dictionaries import fill
from minicache.options.stage_one import PrecomputeConfig
from minicache.options.train import TrainConfig
from minicache.processes.world import join_world, leave_world
from minicache.stages.precompute import precompute
from minicache.stages.train import train
from minicache.trackers import Silent

world = join_world()
for stage, options in json.loads(Path(sys.argv[1]).read_text()):
    if stage == "train":
        train(fill(TrainConfig, options), world, Silent())
    else:
        precompute(fill(PrecomputeConfig, options), world, Silent())
leave_world()
