"""Stage one: preference files + a frozen reference -> a reference cache."""

import platform
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from minicache import __version__
from minicache.cache.schema import FORMAT_VERSION, CachedPairs, Identity, Log, Manifest, RefBlock, Source, digest_of
from minicache.cache.writer import CacheWriter, claimed
from minicache.config import PrecomputeConfig
from minicache.data.batching import balance
from minicache.data.encode import Encoder
from minicache.data.formats import read_rows
from minicache.data.tokenizers import ChatTokenizer
from minicache.disk import writing
from minicache.distributed import World
from minicache.errors import DataError, MinicacheError, ModelError, OutputError
from minicache.evaluation import TOLERANCE, check_reproduces, score_table, settle_layout
from minicache.models import LoadedModel, load_model, save_tokenizer
from minicache.models.huggingface import ATTENTION
from minicache.models.load import lasting_name
from minicache.pairs import PairTable
from minicache.scoring import Scorer, resolve_dtype
from minicache.stages.intake import REFUSED_FILE, take_in
from minicache.trackers import Tracker

BLOCK_SECONDS = 60  # what a kill may cost
ASSUMED_FLOPS = {"cpu": 5e10, "cuda": 1e14}  # a careful guess; only the size of a block depends on it


@dataclass(frozen=True)
class PrecomputeReport:
    """What stage one did. sources: every file of the cache. scored: pairs scored by this call, on all processes."""

    ref_cache: Path
    sources: list[Source]
    pairs: int
    scored: int
    refused_file: Path


def precompute(config: PrecomputeConfig, world: World, tracker: Tracker) -> PrecomputeReport:
    """Read, encode, score and store. What is already in the cache is not done again.

    Raises:
        MinicacheError: any of its kinds. If it was about the data, nothing of a new cache remains and an old one is as before;
            otherwise (a full disk, a model that gives no finite logprob) what is finished stays.
    """
    for file in config.data:  # a wrong path should not cost the loading of a model
        next(read_rows(file))
    tracker.begin(f"loading {config.model}", None)
    loaded = load_model(config.model, config.trust_remote_code)
    dtype = resolve_dtype(config.dtype, world.device)
    with ExitStack() as claim:
        if world.is_main:
            _prepare(config, loaded, dtype, world.device, tracker, claim)
        world.barrier()
        scorer = Scorer(loaded.model.to(world.device, torch.float32), dtype)
        cache = CacheWriter(config.ref_cache)
        settle_layout(scorer, cache.pairs(0), config.layout, world.device, tracker)
        scored = _score_blocks(cache, scorer, config.tokens_per_batch, world, tracker)
    return PrecomputeReport(
        config.ref_cache, cache.log.sources, cache.log.pairs, scored, config.ref_cache / REFUSED_FILE
    )


# --- rank 0 alone: afterwards the cache exists and holds every pair ---


def _prepare(
    config: PrecomputeConfig, loaded: LoadedModel, dtype: str, device: torch.device, tracker: Tracker, claim: ExitStack
) -> None:
    path = config.ref_cache
    with TemporaryDirectory(prefix="minidpo-") as scratch:
        tokenizer_dir = Path(scratch) / "tokenizer"
        tokenizer = _tokenizer(config, tokenizer_dir)
        identity = _identity(config, loaded, tokenizer, dtype, device)
        existed = (path / "zarr.json").exists()
        if not existed:
            manifest = Manifest(identity, Log(lasting_name(config.model), _now(), _versions()))
            CacheWriter.create(path, manifest, lambda place: shutil.copytree(tokenizer_dir, place))
        claim.enter_context(claimed(path))
        cache = CacheWriter(path)
        if existed:
            block_pairs = config.block_pairs or cache.identity.block_pairs
            cache.identity.require(replace(identity, block_pairs=block_pairs), str(path))
            cache.remove_leftovers()
            _mend_tokenizer(cache, tokenizer_dir)
            tracker.note(f"{path} exists: going on with it")
    encoder = Encoder(tokenizer, config.max_length, config.truncate, config.loss_on, config.think)
    try:
        take_in(cache, encoder, config.data, config.format, config.on_bad_row == "fail", tracker)
    except OutputError:
        raise
    except MinicacheError:
        if not existed:
            shutil.rmtree(path.resolve(), ignore_errors=True)
        raise


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
        tokenizer = ChatTokenizer.load(cache.tokenizer_dir)
        intact = (tokenizer.digest, _template_digest(tokenizer)) == (cache.identity.tokenizer, cache.identity.template)
    except (MinicacheError, ValueError):
        intact = False
    if not intact:
        with writing(cache.tokenizer_dir):
            shutil.rmtree(cache.tokenizer_dir, ignore_errors=True)
            shutil.copytree(sound, cache.tokenizer_dir)


def _template_digest(tokenizer: ChatTokenizer) -> str:
    return digest_of([tokenizer.template, tokenizer.special])


def _identity(
    config: PrecomputeConfig, loaded: LoadedModel, tokenizer: ChatTokenizer, dtype: str, device: torch.device
) -> Identity:
    return Identity(
        format_version=FORMAT_VERSION,
        weights=loaded.fingerprint,
        family=loaded.family,
        tokenizer=tokenizer.digest,
        template=_template_digest(tokenizer),
        vocabulary=loaded.vocabulary,
        max_length=config.max_length,
        truncate=config.truncate,
        loss_on=config.loss_on,
        think=config.think,
        dtype=dtype,
        attention=ATTENTION,
        block_pairs=config.block_pairs or _block_pairs(loaded, config.max_length, device),
        per_token=config.per_token,
    )


def _block_pairs(loaded: LoadedModel, max_length: int, device: torch.device) -> int:
    """Pairs that take about BLOCK_SECONDS to score: a power of two, at most 4096."""
    parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
    seconds_a_pair = 2 * parameters * min(max_length, 512) / ASSUMED_FLOPS[device.type]
    return 1 << int(np.clip(np.log2(BLOCK_SECONDS / seconds_a_pair), 4, 12))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _versions() -> dict[str, str]:
    packages = ("torch", "transformers", "tokenizers", "zarr", "numpy")
    ours = {"minicache": __version__, "python": platform.python_version()}
    return {**ours, **{package: version(package) for package in packages}}


# --- all ranks ---


def _score_blocks(cache: CacheWriter, scorer: Scorer, budget: int | None, world: World, tracker: Tracker) -> int:
    """Score the blocks that are not, each rank its share; returns how many pairs that were."""
    todo, sizes = world.broadcast(_todo(cache) if world.is_main else None)
    if done := sorted(set(range(cache.blocks)) - set(todo)):
        cached = CachedPairs(cache.pairs(done[0]), cache.ref(done[0]))
        check_reproduces(scorer, cached, world.device, TOLERANCE[cache.identity.dtype], "the model")
    if not todo:
        return 0
    pairs = int(sizes[:, 0].sum())
    share = balance(sizes[:, 1], world.size)[world.rank]
    scale = pairs / max(1, int(sizes[share, 0].sum()))

    def tell(pairs: int, tokens: int) -> None:  # rank 0 tells of everyone's progress by its own
        tracker.advance(round(pairs * scale), round(tokens * scale))

    tracker.begin("scoring", pairs)
    with ThreadPoolExecutor(1) as writer:  # a block is written while the next is scored
        written: Future[None] | None = None
        for block in (todo[index] for index in share):
            table = cache.pairs(block)
            scores = _score(scorer, table, budget, cache.identity.per_token, world.device, tell)
            _check_finite(cache, table, scores)
            if written:
                written.result()
            written = writer.submit(cache.write_ref, block, scores)
    if written:
        written.result()
    world.barrier()
    return pairs


def _todo(cache: CacheWriter) -> tuple[list[int], np.ndarray]:
    """Blocks to score, and their sizes: (n, 2) pairs and stored tokens."""
    blocks = cache.unscored()
    return blocks, np.array([cache.block_size(block) for block in blocks], np.int64).reshape(-1, 2)


def _score(
    scorer: Scorer,
    table: PairTable,
    budget: int | None,
    per_token: bool,
    device: torch.device,
    tell: Callable[[int, int], None],
) -> RefBlock:
    logp_mean = np.full((len(table), 2), np.nan, np.float32)
    token_logps = np.full(len(table.tokens), np.nan, np.float32) if per_token else None
    for indices, batch, scores in score_table(scorer, table, np.arange(len(table)), budget, device):
        logp_mean[indices] = scores.logp_mean.cpu().numpy()
        if token_logps is not None:
            spans = [np.arange(table.offsets[index], table.offsets[index + 1]) for index in indices]
            token_logps[np.concatenate(spans)[batch.places.cpu().numpy()]] = scores.token_logps.cpu().numpy()
        tell(len(indices), int(table.side_lengths[indices].sum()))
    return RefBlock(logp_mean, table.token_counts, token_logps)


def _check_finite(cache: CacheWriter, table: PairTable, scores: RefBlock) -> None:
    if len(bad := np.flatnonzero(~np.isfinite(scores.logp_mean).all(axis=1))):
        file, line = table.source[bad[0]].tolist()
        raise ModelError(
            f"the model gives no finite logprob for {len(bad)} pairs, the first from {cache.log.sources[file].name}:{line}; "
            "nothing of their block was stored. Expected sound weights; in float16 try --dtype float32, into another --ref-cache"
        )
