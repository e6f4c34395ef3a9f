"""Preparing the cache before stage one scores: one process makes or checks it and encodes the data, alone or among shard jobs."""

import logging
import shutil
import time
from contextlib import ExitStack
from pathlib import Path

import torch

from minicache.cache.blocks import TOKENIZER, Blocks
from minicache.cache.places.claims import CLAIM_FILE, SHARD_CLAIMS, Claim
from minicache.cache.places.directory import remove_drafts
from minicache.cache.places.opening import claimed, take_alone
from minicache.cache.places.place import POLL_SECONDS, ROOT
from minicache.cache.writer import CacheWriter
from minicache.data.files import DataFile
from minicache.disk import scratch_folder
from minicache.errors import CacheDamaged, CacheError, CacheNotFound, MinicacheError, OutputError, StoreError
from minicache.intake.blocks import encoder_of, holds_all, take_in
from minicache.intake.request import Request
from minicache.intake.tokenizer_files import fits
from minicache.models import LoadedModel
from minicache.options.stage_one import PrecomputeConfig
from minicache.trackers import Tracker

log = logging.getLogger(__name__)


def prepare(
    config: PrecomputeConfig,
    files: list[DataFile],
    loaded: LoadedModel,
    device: torch.device,
    tracker: Tracker,
    claims: ExitStack,
) -> None:
    """Make the cache exist, hold every pair, and stay claimed until `claims` closes. One process of a run calls it.

    config: with a settled dtype. files: those that its data names.

    Raises:
        MinicacheError: as `precompute`.
    """
    with scratch_folder("stage-one") as scratch:
        request = Request.of(config, files, loaded, device, tracker, scratch)
        log.debug("%s: identity %s, %s", request.path, request.identity.digest, request.identity.stored)
        if config.shard:
            _join_shards(request, claims)
        else:
            _create_if_absent(request)
            claims.enter_context(claimed(request.path))
            _bring_in(request)


def _create_if_absent(request: Request) -> None:
    """Make an empty cache, unless there is one."""
    if request.place.has(ROOT):
        # of one that was killed while another made the cache
        remove_drafts(request.place.home)
        return
    try:
        CacheWriter.create(request.path, request.manifest, lambda place: shutil.copytree(request.tokenizer_dir, place))
    except OutputError:
        # Another process may have been faster.
        if not request.place.has(ROOT):
            raise


def _bring_in(request: Request) -> None:
    """Encode the data into a cache that is held alone. A cache without any data so far is removed if the data is bad."""
    cache, config = CacheWriter(request.path), request.config
    request.require_same(cache.blocks)
    is_new = not cache.log.sources
    cache.place.remove_leftovers()
    _mend_tokenizer(cache, request.tokenizer_dir)
    if not is_new:
        request.tracker.note(f"{request.path} exists: going on with it")
    encoder = encoder_of(request.identity, request.tokenizer)
    try:
        take_in(cache, encoder, request.files, config.reading, config.on_bad_row == "fail", request.tracker)
    except (OutputError, StoreError):
        raise
    except MinicacheError:
        if is_new:
            cache.place.remove()
        raise
    if config.shard and cache.log.shards != config.share[1]:
        cache.log.shards = config.share[1]
        cache.write_log()


# --- one job among many: one encodes the data while the others wait; then all score together ---


def _join_shards(request: Request, claims: ExitStack) -> None:
    """Wait until all data is in the cache, or bring it in; then hold the cache together with other jobs and this shard alone."""
    number, of = request.config.share
    claim = request.place.claim(CLAIM_FILE)
    claims.callback(claim.release)
    _claim_together(request, claim)
    shard = request.place.claim(f"{SHARD_CLAIMS}{number}-of-{of}.claim")
    if not take_alone(shard):
        raise OutputError(f"{request.path}: another job is at work on --shard {number}/{of}; wait for its end")
    claims.callback(shard.remove)
    cache = CacheWriter(request.path)
    cache.remove_leftovers_of(range(number - 1, len(cache.blocks), of))


def _claim_together(request: Request, claim: Claim) -> None:
    """Hold the cache together with the other jobs once all data is in and sound.

    Only a job that holds the cache alone changes its pairs. If that job dies, the next one goes on.
    """
    wait = _Waiting(request)
    is_damaged = False
    while True:
        _create_if_absent(request)
        alone = is_damaged or not _is_ready(request)
        if not claim.take(alone):
            wait(alone)
            continue
        _require_locks(request, claim)
        if alone:
            _bring_in(request)
            if claim.take(alone=False):
                return
        elif _is_ready(request) and _is_sound(request):
            return
        # The cache has changed since it was checked, or is damaged: only a job that holds it alone may repair it.
        is_damaged = not alone
        claim.release()


def _require_locks(request: Request, claim: Claim) -> None:
    """Raises OutputError: the file system has no locks that several jobs can share."""
    if not claim.is_safe:
        raise OutputError(
            f"{request.path}: its file system has no locks that several jobs can hold together (Windows has none), which "
            "--shard needs; expected another file system, or a single precompute-ref without --shard"
        )


class _Waiting:
    """Waits for a moment; the first call shows the reason."""

    def __init__(self, request: Request) -> None:
        self.request, self.is_announced = request, False

    def __call__(self, alone: bool) -> None:
        if not self.is_announced:
            what = "to encode the data" if alone else "to score"
            self.request.tracker.begin(f"waiting {what}: another job is writing into {self.request.path}", None)
            self.is_announced = True
        time.sleep(POLL_SECONDS)


def _is_ready(request: Request) -> bool:
    """Whether, by the cache's log, all data is in it and it is shared among as many jobs as asked for."""
    try:
        blocks = Blocks(request.path)
    except (CacheNotFound, CacheDamaged):
        # It is being made, changed or removed. If it is damaged after all, the job that holds it alone reports that.
        return False
    request.require_same(blocks)
    of = request.config.share[1]
    return blocks.log.shards == of and holds_all(blocks, request.files, request.config.reading)


def _is_sound(request: Request) -> bool:
    """Whether the pairs of this shard's blocks can be read, and those of block 0, from which every job chooses its layout."""
    blocks, (number, of) = Blocks(request.path), request.config.share
    own = {0, *range(number - 1, len(blocks), of)}
    return not any(isinstance(found, CacheError) for _, found in blocks.each(blocks.pairs, own))


def _mend_tokenizer(cache: CacheWriter, sound: Path) -> None:
    """Write the tokenizer's files into the cache again if they are missing or damaged there."""
    try:
        intact = fits(cache.blocks.tokenizer_dir, cache.identity)
    except (MinicacheError, ValueError):
        intact = False
    if not intact:
        cache.place.put_folder(TOKENIZER, sound)
