"""A cache's pairs, for every process of a run: in its own memory, or in one scratch file for all of a machine."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import torch

from minicache.cache.contents import Contents
from minicache.cache.reader import JoinedCaches, ReferenceCache
from minicache.cache.schema import CachedPairs
from minicache.cache.scratch import ScratchFile, map_scratch, usual_directory
from minicache.errors import MinicacheError
from minicache.models import LoadedModel, load_model
from minicache.processes.world import World
from minicache.scoring.budget import free_bytes
from minicache.trackers import Tracker

MOST = 0.25  # of the machine's free memory for the copies of all its processes: the model is yet to come


def load_pairs(
    cache: ReferenceCache | JoinedCaches, scratch: Path | None, world: World, tracker: Tracker
) -> CachedPairs:
    """All pairs, every block checked. To be called by all processes, each of which gets the same columns.

    scratch: decode into a file in this directory, which goes with the run. None: in memory where there is room for it.

    Raises:
        CacheError: as `ReferenceCache.load`. OutputError: the scratch directory cannot hold the pairs.
    """
    tracker.begin("reading the cache", None)
    contents = cache.contents
    size, processes = contents.decoded_bytes, int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
    too_large = size > MOST * free_bytes(torch.device("cpu"), processes)
    if not (scratch or world.any(too_large)):
        return contents.load()
    directory = scratch or usual_directory()
    tracker.note(
        f"{contents.parts[0].path}: {size / 1e6:,.0f} MB of pairs are decoded into a file in {directory}, not into memory"
    )
    return _load_into(contents, directory, size, world)


def _load_into(contents: Contents, directory: Path, size: int, world: World) -> CachedPairs:
    """The first process of each machine fills a file that the others see."""
    local = int(os.environ.get("LOCAL_RANK", 0)) if world.size > 1 else 0
    run = world.broadcast(uuid4().hex)
    file = directory / f"minidpo-{run}-{world.rank - local}"
    with ExitStack() as stack:
        made = None
        with _in_all(world):
            if not local:
                made = stack.enter_context(closing(ScratchFile(file, size)))
        with _in_all(world):
            mapped = map_scratch(file, size)
        with _in_all(world):
            if made:
                made.unname()
                made.reserve()
                contents.load(made.buffer)
    return contents.columns(mapped)


@contextmanager
def _in_all(world: World) -> Iterator[None]:
    """What one process fails in, all do, for the same reason: nobody waits for one that has ended."""
    problem = None
    try:
        yield
    except MinicacheError as error:
        problem = error
    if problems := [each for each in world.gather(problem) if each]:
        raise problem or problems[0]


@dataclass(frozen=True)
class Sources:
    """Where a run's pairs and model come from: from disk, unless somebody has read them before and hands them in."""

    pairs: Callable[[ReferenceCache | JoinedCaches, Path | None, World, Tracker], CachedPairs] = load_pairs
    model: Callable[[str, bool], LoadedModel] = load_model
