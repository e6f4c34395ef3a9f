"""The choice of the cached pairs that a run trains on, and of those that it is validated on."""

import logging
from collections import Counter
from contextlib import closing
from hashlib import blake2b

import numpy as np

from minicache.cache.reader import JoinedCaches, ReferenceCache
from minicache.cache.schema import CachedPairs
from minicache.data.files import read_rows
from minicache.data.places import located
from minicache.data.tokenizers import ChatTokenizer
from minicache.data.workers import RowEncoder
from minicache.errors import CacheMismatch, ConfigError, RowRefused
from minicache.intake.blocks import encoder_of
from minicache.options.train import TrainConfig
from minicache.pairs import PairTable
from minicache.processes.world import World
from minicache.scoring.batching import Indices
from minicache.scoring.loading import Sources
from minicache.text import ranges
from minicache.trackers import Tracker
from minicache.training.order import Mixture
from minicache.training.validation import EvalSet, require_per_token

log = logging.getLogger(__name__)

# Ranges of lines that an error names.
LISTED = 20
# Fields of an identity in which the cache of --eval-cache must equal the one trained on.
SAME_MODEL = ("weights", "quantization", "tokenizer", "template", "vocabulary")


def choose_pairs(
    config: TrainConfig,
    caches: JoinedCaches,
    cached: CachedPairs,
    world: World,
    tracker: Tracker,
    sources: Sources,
) -> tuple[Mixture, EvalSet | None]:
    """The pairs to train on and those to validate on: a function of the pairs' digests, the files and the weights alone.

    Raises:
        CacheMismatch: a pair of --data is in none of the caches. ConfigError: a cache or a side of --holdout has no pair left.
        DataError: a file of --data cannot be read.
    """
    parts = _parts(caches, cached.table, tracker)
    log.debug("pairs of each cache to choose from: %s", [len(part) for part in parts])
    if config.data:
        parts = _asked_for(config, caches.caches[0], cached.table, parts, world, tracker)
    pairs = np.concatenate(parts)
    if config.validation.eval_cache:
        trained = cached.table.keys[pairs]
        return _mixture(config, caches, parts, tracker), _of_other(config, caches, trained, world, tracker, sources)
    held_out = _held_out(config.validation.holdout, cached, pairs)
    if held_out:
        tracker.note(f"{len(held_out.indices):,} of {len(pairs):,} pairs are held out, chosen by their digests")
        parts = [part[~np.isin(part, held_out.indices)] for part in parts]
    return _mixture(config, caches, parts, tracker), held_out


def digest_of(mixture: Mixture, table: PairTable) -> str:
    """A digest of the pairs of a mixture, their order, and how many of them an epoch takes."""
    state = blake2b(repr(mixture.taken).encode(), digest_size=16)
    for part in mixture.parts:
        state.update(table.keys[part].tobytes())
    return state.hexdigest()


def _parts(caches: JoinedCaches, table: PairTable, tracker: Tracker) -> list[Indices]:
    """The pairs of each cache; a pair of several caches belongs to the first."""
    ends = np.cumsum([cache.log.pairs for cache in caches.caches])
    parts = np.split(np.arange(len(table)), ends[:-1])
    if len(parts) == 1:
        return parts
    first = np.unique(table.keys, return_index=True)[1]
    if again := len(table) - len(first):
        tracker.note(f"{again:,} pairs are in more than one cache: each is taken from the first that has it")
    return [np.intersect1d(part, first) for part in parts]


def _mixture(config: TrainConfig, caches: JoinedCaches, parts: list[Indices], tracker: Tracker) -> Mixture:
    """The parts with the caches' weights, if they have any. Raises ConfigError: a cache with a weight has no pair left."""
    weights = [weight for _, weight in config.caches if weight is not None]
    if not weights:
        return Mixture.of([part for part in parts if len(part)])
    for cache, part in zip(caches.caches, parts, strict=True):
        if not len(part):
            raise ConfigError(f"--ref-cache {cache.path}: has no pair left to train on, and so no share; leave it out")
    mixture = Mixture.of(parts, weights)
    portions = zip(caches.caches, mixture.parts, mixture.taken, strict=True)
    listed = ", ".join(f"{taken:,} of {len(part):,} pairs of {cache.path}" for cache, part, taken in portions)
    tracker.note(f"an epoch takes {listed}")
    return mixture


# --- --data: the pairs of some files ---


def _asked_for(
    config: TrainConfig, cache: ReferenceCache, table: PairTable, parts: list[Indices], world: World, tracker: Tracker
) -> list[Indices]:
    """The pairs of each part that are in the files of --data, in the files' order."""
    asked = world.first(lambda: _asked(config, cache, table, tracker))
    return [asked[np.isin(asked, part)] for part in parts]


def _asked(config: TrainConfig, cache: ReferenceCache, table: PairTable, tracker: Tracker) -> Indices:
    """The pairs of the files of --data, in their order, each once. Rows that cannot be used are counted and left out."""
    tracker.begin(f"looking up the pairs of {', '.join(config.data)}", None)
    encoder = encoder_of(cache.identity, ChatTokenizer.load(cache.tokenizer_dir))
    digests: list[bytes] = []
    places: list[tuple[int, int]] = []
    refused: Counter[str] = Counter()
    with located(config.data, tracker.note) as files:
        for number, file in enumerate(files):
            rows = RowEncoder(encoder, file.name, config.reading, number).encode_by_all_cores(read_rows(file))
            with closing(rows):
                for item in rows:
                    if isinstance(item, RowRefused):
                        refused[item.reason] += 1
                    else:
                        digests.append(item.pair.digest)
                        places.append(item.pair.source)
    keys, first = np.unique(np.frombuffer(b"".join(digests), "V16"), return_index=True)
    _, in_keys, in_table = np.intersect1d(keys, table.keys, return_indices=True)
    if len(in_keys) < len(keys):
        _raise_missing([file.name for file in files], np.array(places)[np.sort(np.delete(first, in_keys))], cache)
    if not len(keys):
        raise ConfigError(
            f"--data {', '.join(config.data)}: none of {refused.total()} rows is a pair; {_reasons(refused)}"
        )
    left_out = [f"{len(digests) - len(keys):,} repeat another"] if len(digests) > len(keys) else []
    left_out += [f"{refused.total():,} cannot be used ({_reasons(refused)})"] if refused else []
    if left_out:
        tracker.note(f"--data: {len(keys):,} pairs; of the other rows {' and '.join(left_out)}")
    return in_table[np.argsort(first[in_keys])]


def _reasons(refused: Counter[str]) -> str:
    """The number of refused rows for each reason, in words."""
    return ", ".join(f"{count:,} {reason}" for reason, count in refused.most_common())


def _raise_missing(files: list[str], places: np.ndarray, cache: ReferenceCache) -> None:
    """Raises CacheMismatch. places: (n, 2) number of the file and line of each pair that is in no cache."""
    listed = []
    for number, file in enumerate(files):
        lines = ranges(places[places[:, 0] == number, 1].tolist()).split(", ")
        if lines != [""]:
            more = f" and {len(lines) - LISTED:,} more ranges" if len(lines) > LISTED else ""
            listed.append(f"{file} line {', '.join(lines[:LISTED])}{more}")
    raise CacheMismatch(
        f"{len(places):,} pairs of --data are not in the cache ({'; '.join(listed)}). Expected pairs that stage one has scored: "
        f"precompute-ref with this --data and --ref-cache {cache.path} adds them"
    )


# --- validation ---


def _held_out(share: float, cached: CachedPairs, asked: Indices) -> EvalSet | None:
    """The pairs that --holdout keeps back; None without it. asked: (n,) all pairs of the run."""
    if not share:
        return None
    held = asked[cached.table.digest[asked, 0] < np.uint64(share * 2**64)]
    if len(held) in (0, len(asked)):
        raise ConfigError(
            f"--holdout {share}: of {len(asked)} pairs {len(held)} would be held out; expected some and not all"
        )
    return EvalSet(cached, held)


def _of_other(
    config: TrainConfig, caches: JoinedCaches, trained: np.ndarray, world: World, tracker: Tracker, sources: Sources
) -> EvalSet:
    """All pairs of --eval-cache. trained: (n,) keys of the pairs that the run may train on."""
    assert config.validation.eval_cache
    place = config.validation.eval_cache
    cache, other = caches.caches[0], world.each(lambda: ReferenceCache(place))
    for name in SAME_MODEL:
        mine, theirs = getattr(cache.identity, name), getattr(other.identity, name)
        if mine != theirs:
            raise CacheMismatch(
                f"{other.path}: {name} {theirs}, but {cache.path} was made with {mine}; expected the same"
            )
    require_per_token(other, config.loss_options)
    pairs = sources.pairs(other, config.scratch, world, tracker)
    if shared := int(np.isin(pairs.table.keys, trained).sum()):
        tracker.note(
            f"{shared:,} of the {len(pairs.table):,} pairs of {other.path} are trained on too, so the validation loss is too low"
        )
    return EvalSet(pairs, np.arange(len(pairs.table)))
