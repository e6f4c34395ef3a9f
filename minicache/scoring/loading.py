"""Loading a cache's pairs in every process of a run: into its own memory, or into one scratch file per machine."""

import logging
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
from minicache.cache.scratch import ScratchFile, map_scratch
from minicache.disk import usual_directory
from minicache.errors import MinicacheError
from minicache.models import LoadedModel, load_model
from minicache.processes.world import World
from minicache.scoring.budget import free_bytes
from minicache.trackers import Tracker

log = logging.getLogger(__name__)

# Most of the machine's free memory for the copies of all its processes: the model is loaded after them.
MOST = 0.25


def load_pairs(
    cache: ReferenceCache | JoinedCaches, scratch: Path | None, world: World, tracker: Tracker
) -> CachedPairs:
    """All pairs, every block checked. All processes must call this; each gets the same columns.

    scratch: decode into a file in this directory, which is gone when the run ends. None: into memory if they fit.

    Raises:
        CacheError: as `ReferenceCache.load`.
        OutputError: the scratch directory cannot hold the pairs.
    """
    tracker.begin("reading the cache", None)
    contents = cache.contents
    size, processes = contents.decoded_bytes, int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
    too_large = size > MOST * free_bytes(torch.device("cpu"), processes)
    if not (scratch or world.any(too_large)):
        log.debug("%d bytes of pairs are decoded into memory", size)
        return contents.load()
    directory = scratch or usual_directory()
    log.debug("%d bytes of pairs are decoded into a file in %s", size, directory)
    tracker.note(
        f"{contents.parts[0].path}: {size / 1e6:,.0f} MB of pairs are decoded into a file in {directory}, not into memory"
    )
    return _load_into(contents, directory, size, world)


def _load_into(contents: Contents, directory: Path, size: int, world: World) -> CachedPairs:
    """All pairs, in a file that the first process of each machine fills and the others map."""
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
    """Raise an error of one process in all of them, so that none waits for one that has ended."""
    problem = None
    try:
        yield
    except MinicacheError as error:
        problem = error
    if problems := [each for each in world.gather(problem) if each]:
        raise problem or problems[0]


@dataclass(frozen=True)
class Sources:
    """The functions that load a run's pairs and model. A sweep replaces them to load each once for all runs."""

    pairs: Callable[[ReferenceCache | JoinedCaches, Path | None, World, Tracker], CachedPairs] = load_pairs
    model: Callable[[str, bool, str], LoadedModel] = load_model
