"""Before stage one scores: one process makes the cache, or finds it fitting, and takes in the data; alone or among shard jobs."""

import platform
import shutil
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from minicache import __version__
from minicache.cache.blocks import TOKENIZER
from minicache.cache.identity import FORMAT_VERSION, Identity
from minicache.cache.manifest import Log, Manifest, now
from minicache.cache.places.claims import CLAIM_FILE, SHARD_CLAIMS, Claim
from minicache.cache.places.opening import claimed, place_at, taken
from minicache.cache.places.place import POLL_SECONDS, ROOT, Place
from minicache.cache.reader import ReferenceCache
from minicache.cache.writer import CacheWriter
from minicache.data.tokenizers import ChatTokenizer
from minicache.errors import (
    CacheDamaged,
    CacheIncomplete,
    CacheNotFound,
    DataError,
    MinicacheError,
    OutputError,
    StoreError,
)
from minicache.intake.blocks import encoder_of, hash_files, is_taken_in, take_in
from minicache.intake.tokenizer_files import fits, template_digest
from minicache.models import LoadedModel, save_tokenizer
from minicache.models.huggingface import ATTENTION
from minicache.models.load import lasting_name
from minicache.options.stage_one import PrecomputeConfig
from minicache.options.where import Where
from minicache.trackers import Tracker

BLOCK_SECONDS = 60  # what a kill may cost
ASSUMED_FLOPS = {"cpu": 5e10, "cuda": 1e14}  # a careful guess; only the size of a block depends on it


@dataclass(frozen=True)
class _Request:
    """What is asked for. tokenizer_dir: its files, as they are to lie in the cache. files: sha256 -> name."""

    config: PrecomputeConfig
    identity: Identity
    tokenizer: ChatTokenizer
    tokenizer_dir: Path
    files: dict[str, str]
    tracker: Tracker

    @property
    def place(self) -> Place:
        return place_at(self.config.ref_cache)

    @property
    def path(self) -> Where:
        return self.place.where

    def require_same(self, cache: ReferenceCache) -> None:
        """Raises CacheMismatch. The size of a block is the cache's own, unless one is asked for."""
        block_pairs = self.config.block_pairs or cache.identity.block_pairs
        cache.identity.require(
            replace(self.identity, block_pairs=block_pairs),
            f"{self.path}: made for another request",
            ("the cache", "asked for"),
            "Ask for the same, or name another --ref-cache",
        )


def prepare(
    config: PrecomputeConfig, loaded: LoadedModel, dtype: str, device: torch.device, tracker: Tracker, claims: ExitStack
) -> None:
    """For one process of a run: afterwards the cache exists, holds every pair, and is claimed until `claims` closes.

    Raises:
        MinicacheError: as `precompute`.
    """
    with TemporaryDirectory(prefix="minidpo-") as scratch:
        tokenizer_dir = Path(scratch) / "tokenizer"
        tokenizer = _tokenizer(config, tokenizer_dir)
        identity = _identity(config, loaded, tokenizer, dtype, device)
        request = _Request(config, identity, tokenizer, tokenizer_dir, hash_files(config.data), tracker)
        if config.shard:
            _join_shards(request, claims)
        else:
            _create_if_absent(request)
            claims.enter_context(claimed(request.path))
            _bring_in(request)


def _create_if_absent(request: _Request) -> None:
    if request.place.has(ROOT):
        return
    manifest = Manifest(request.identity, Log(lasting_name(request.config.model), now(), _versions()))
    try:
        CacheWriter.create(request.path, manifest, lambda place: shutil.copytree(request.tokenizer_dir, place))
    except OutputError:
        if not request.place.has(ROOT):  # another process was faster
            raise


def _bring_in(request: _Request) -> None:
    """Take in the data, alone in the cache. If the data is bad, a cache that never held any is taken away."""
    cache, config = CacheWriter(request.path), request.config
    request.require_same(cache)
    is_new = not cache.log.sources
    cache.place.remove_leftovers()
    _mend_tokenizer(cache, request.tokenizer_dir)
    if not is_new:
        request.tracker.note(f"{request.path} exists: going on with it")
    encoder = encoder_of(request.identity, request.tokenizer)
    try:
        take_in(cache, encoder, request.files, config.format, config.on_bad_row == "fail", request.tracker)
    except (OutputError, StoreError):
        raise
    except MinicacheError:
        if is_new:
            cache.place.remove()
        raise
    if config.shard and cache.log.shards != config.share[1]:
        cache.log.shards = config.share[1]
        cache.write_log()


# --- one job among many: one takes in the data, the others wait for it; then all score together ---


def _join_shards(request: _Request, claims: ExitStack) -> None:
    """Wait until the data is in, or bring it in; then hold the cache together with the other jobs, and this shard alone."""
    number, of = request.config.share
    claim = request.place.claim(CLAIM_FILE)
    claims.callback(claim.release)
    _claim_together(request, claim)
    shard = request.place.claim(f"{SHARD_CLAIMS}{number}-of-{of}.claim")
    if not taken(shard):
        raise OutputError(f"{request.path}: another job is at work on --shard {number}/{of}; wait for its end")
    claims.callback(shard.remove)
    cache = CacheWriter(request.path)
    cache.remove_leftovers_of(range(number - 1, cache.blocks, of))


def _claim_together(request: _Request, claim: Claim) -> None:
    """Hold the cache together with the other jobs once all data is in and sound.

    What the cache holds is changed only by a job that holds it alone. If that job dies, the next one goes on.
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
        # what was read before the claim is no longer so; or only a job that has the cache alone may mend it
        is_damaged = not alone
        claim.release()


def _require_locks(request: _Request, claim: Claim) -> None:
    if not claim.is_safe:
        raise OutputError(
            f"{request.path}: its file system has no locks that several jobs hold together (on Windows none has), by which those "
            "of --shard agree on who does what; expected another one, or a single precompute-ref without --shard"
        )


class _Waiting:
    """Waits a moment, and says at the first time what for."""

    def __init__(self, request: _Request) -> None:
        self.request, self.is_announced = request, False

    def __call__(self, alone: bool) -> None:
        if not self.is_announced:
            what = "to take in the data" if alone else "to score"
            self.request.tracker.begin(f"waiting {what}: another job is writing into {self.request.path}", None)
            self.is_announced = True
        time.sleep(POLL_SECONDS)


def _is_ready(request: _Request) -> bool:
    """Whether the cache's log says that all data is in and that it is shared among as many jobs as asked."""
    try:
        cache = ReferenceCache(request.path)
    except (
        CacheNotFound,
        CacheDamaged,
    ):  # being made, changed or taken away; if it stays so, who has it alone will tell
        return False
    request.require_same(cache)
    of = request.config.share[1]
    return cache.log.shards == of and is_taken_in(cache, request.files, request.config.format)


def _is_sound(request: _Request) -> bool:
    """Whether the pairs of this shard's blocks can be read, and those of block 0, which every job looks at."""
    cache, (number, of) = ReferenceCache(request.path), request.config.share
    try:
        for block in {0, *range(number - 1, cache.blocks, of)}:
            cache.pairs(block)
    except (CacheIncomplete, CacheDamaged):
        return False
    return True


# --- what the cache will say that it is ---


def _tokenizer(config: PrecomputeConfig, directory: Path) -> ChatTokenizer:
    template = None
    if config.chat_template:
        try:
            template = config.chat_template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"--chat-template {config.chat_template}: cannot be read: {error}") from error
    save_tokenizer(config.tokenizer or config.model, directory, template, config.trust_remote_code)
    tokenizer = ChatTokenizer.load(directory)
    # A policy trained on a form of conversation is to be prompted in that form: it stays with the tokenizer.
    (directory / "chat_template.jinja").write_text(tokenizer.template, encoding="utf-8")
    return tokenizer


def _mend_tokenizer(cache: CacheWriter, sound: Path) -> None:
    """Put the tokenizer's files into the cache again if those there are missing or damaged."""
    try:
        intact = fits(cache.tokenizer_dir, cache.identity)
    except (MinicacheError, ValueError):
        intact = False
    if not intact:
        cache.place.put_folder(TOKENIZER, sound)


def _identity(
    config: PrecomputeConfig, loaded: LoadedModel, tokenizer: ChatTokenizer, dtype: str, device: torch.device
) -> Identity:
    return Identity(
        format_version=FORMAT_VERSION,
        weights=loaded.fingerprint,
        family=loaded.family,
        tokenizer=tokenizer.digest,
        template=template_digest(tokenizer),
        vocabulary=loaded.vocabulary,
        max_length=config.max_length,
        truncate=config.truncate,
        loss_on=config.loss_on,
        think=config.think,
        dtype=dtype,
        attention=ATTENTION,
        block_pairs=config.block_pairs or _block_pairs(loaded, config.max_length, device),
        per_token=config.per_token,
        special_text=config.special_text,
    )


def _block_pairs(loaded: LoadedModel, max_length: int, device: torch.device) -> int:
    """Pairs that take about BLOCK_SECONDS to score: a power of two, at most 4096."""
    parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
    seconds_a_pair = 2 * parameters * min(max_length, 512) / ASSUMED_FLOPS[device.type]
    return 1 << int(np.clip(np.log2(BLOCK_SECONDS / seconds_a_pair), 4, 12))


def _versions() -> dict[str, str]:
    packages = ("torch", "transformers", "tokenizers", "zarr", "numpy")
    ours = {"minicache": __version__, "python": platform.python_version()}
    return {**ours, **{package: version(package) for package in packages}}
