"""Loading a cache's pairs in every process of a run: into its own memory, or into one scratch file per machine."""

import logging
import os
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch

from minicache.cache.contents import Contents
from minicache.cache.reader import JoinedCaches, ReferenceCache
from minicache.cache.schema import CachedPairs
from minicache.cache.scratch import ScratchFile, map_scratch
from minicache.disk import usual_directory
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
    size = contents.decoded_bytes
    too_large = size > MOST * free_bytes(torch.device("cpu"), world.local_size)
    if not (scratch or any(world.gather(too_large))):
        log.debug("%d bytes of pairs are decoded into memory", size)
        return _same(world.each(contents.load), world)
    directory = scratch or usual_directory()
    log.debug("%d bytes of pairs are decoded into a file in %s", size, directory)
    tracker.note(
        f"{contents.parts[0].path}: {size / 1e6:,.0f} MB of pairs are decoded into a file in {directory}, not into memory"
    )
    return _same(_load_into(contents, directory, size, world), world)


def _same(pairs: CachedPairs, world: World) -> CachedPairs:
    """The pairs. Raises ConfigError: another process has read others, so that they would share them out differently."""

    def facts() -> dict[str, Any]:
        digest, table = blake2b(digest_size=8), pairs.table
        for column in (table.digest, table.lengths, pairs.reference.logp_mean):
            digest.update(np.ascontiguousarray(column).data)
        return {
            "the pairs in the cache, their number": len(table),
            "the pairs in the cache, their digest": digest.hexdigest(),
        }

    if world.size > 1:
        world.agree(facts)
    return pairs


def _load_into(contents: Contents, directory: Path, size: int, world: World) -> CachedPairs:
    """All pairs, in a file that the first process of each machine fills and the others map."""
    local = int(os.environ.get("LOCAL_RANK", 0)) if world.size > 1 else 0
    run = world.broadcast(uuid4().hex)
    file = directory / f"minidpo-{run}-{world.rank - local}"
    with ExitStack() as stack:
        made = world.each(lambda: None if local else stack.enter_context(closing(ScratchFile(file, size))))
        mapped = world.each(lambda: map_scratch(file, size))
        world.each(lambda: _fill(made, contents))
    return contents.columns(mapped)


def _fill(file: ScratchFile | None, contents: Contents) -> None:
    """Decode all pairs into the file, if this process has made it."""
    if file:
        file.unname()
        file.reserve()
        contents.load(file.buffer)


@dataclass(frozen=True)
class Sources:
    """The functions that load a run's pairs and model. A sweep replaces them to load each once for all runs."""

    pairs: Callable[[ReferenceCache | JoinedCaches, Path | None, World, Tracker], CachedPairs] = load_pairs
    model: Callable[[str, bool, str], LoadedModel] = load_model
