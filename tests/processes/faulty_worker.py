"""One of two processes that run stages one after another, each with a fault on one rank.

python -m tests.processes.faulty_worker JOBS.json prints a JSON line for each job: what the stage ended with, and its notes.
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minicache.cache.contents import Contents
from minicache.errors import CacheNotFound, MinicacheError, OutputError
from minicache.options.dictionaries import fill
from minicache.options.stage_one import PrecomputeConfig
from minicache.options.train import TrainConfig
from minicache.processes.world import join_world, leave_world
from minicache.scoring import budget, layout, scorer
from minicache.stages import precompute as stage_one
from minicache.stages import train as stage_two
from minicache.trackers import Silent
from minicache.training import checkpoints, checks, policy


class Notes(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*arguments: Any, **options: Any) -> Any:
        raise error

    return fail


def other_weights(patch: pytest.MonkeyPatch, module: Any, name: str) -> None:
    """As if this machine's copy of the model were of another training."""
    load = getattr(module, name)

    def loading(*arguments: Any) -> Any:
        loaded = load(*arguments)
        with torch.no_grad():
            loaded.model.lm_head.weight.mul_(1.01)
        return loaded

    patch.setattr(module, name, loading)


def other_pairs(patch: pytest.MonkeyPatch) -> None:
    """As if this machine's copy of the cache held another pair."""
    load = Contents.load

    def loading(*arguments: Any) -> Any:
        pairs = load(*arguments)
        pairs.table.digest[3] += np.uint64(1)
        return pairs

    patch.setattr(Contents, "load", loading)


FULL = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes"
FAULTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "none": lambda patch: None,
    "layout": lambda patch: patch.setattr(layout._Trial, "_try", raising(ValueError("no such kernel here"))),
    "layout is full": lambda patch: patch.setattr(layout._Trial, "_require_apart", raising(RuntimeError(FULL))),
    "budget is full": lambda patch: patch.setattr(budget, "_passes_of", raising(torch.OutOfMemoryError("full"))),
    "a bug": lambda patch: patch.setattr(budget, "_passes_of", raising(ZeroDivisionError("a bug"))),
    "less memory": lambda patch: patch.setattr(budget, "free_bytes", lambda device, processes: 3e7),
    "no head": lambda patch: patch.setattr(scorer, "probed", lambda model: None),
    "no cache": lambda patch: patch.setattr(stage_two, "ReferenceCache", raising(CacheNotFound("no cache here"))),
    "other pairs": other_pairs,
    "other weights": lambda patch: other_weights(patch, stage_one, "load_model"),
    "other start": lambda patch: other_weights(patch, policy, "_load"),
    "no compiler": lambda patch: patch.setattr(checks, "require_optimizer", raising(OutputError("not installed here"))),
    "no checkpoint": lambda patch: patch.setattr(checkpoints, "load", raising(OutputError("no checkpoint"))),
    "no room": lambda patch: patch.setattr(stage_two, "open_run", raising(OutputError("the disk is full"))),
}


@contextmanager
def fault(name: str, is_here: bool) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if is_here:
            FAULTS[name](patch)
        yield


def run(stage: str, options: dict[str, Any], tracker: Notes) -> str:
    try:
        if stage == "train":
            stage_two.train(fill(TrainConfig, options), world, tracker)
        else:
            stage_one.precompute(fill(PrecomputeConfig, options), world, tracker)
    except (MinicacheError, ZeroDivisionError) as error:
        return f"{type(error).__name__}: {error}"
    return "done"


world = join_world()
for name, rank, stage, options in json.loads(Path(sys.argv[1]).read_text()):
    tracker = Notes()
    with fault(name, world.rank == rank):
        ended = run(stage, options, tracker)
    print(json.dumps([ended, tracker.lines]), flush=True)
leave_world()
