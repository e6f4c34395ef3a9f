"""A cache of random pairs without a model: token frequencies follow Zipf's law, about 500 tokens per pair."""

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from minicache.cache.identity import FORMAT_VERSION, Identity
from minicache.cache.manifest import Log, Manifest, Source
from minicache.cache.schema import RefBlock
from minicache.cache.writer import CacheWriter
from minicache.pairs import EncodedPair, PairTable

VOCABULARY, BLOCK = 49152, 4096


def random_blocks(count: int, length: int | None, random: np.random.Generator) -> Iterator[list[EncodedPair]]:
    """Blocks of random pairs. length: tokens of every pair; None draws them."""
    # Zipf's law
    quantiles = np.exp(np.linspace(0, np.log(VOCABULARY), 2**16, endpoint=False)).astype(np.uint16)
    for first in range(0, count, BLOCK):
        pairs = min(BLOCK, count - first)
        if length is None:
            totals = np.clip(random.lognormal(np.log(430), 0.55, pairs), 24, 4096).astype(np.int64)
        else:
            totals = np.full(pairs, length)
        prefix = (totals * random.uniform(0.1, 0.4, pairs)).astype(np.int64)
        chosen = ((totals - prefix) * random.uniform(0.3, 0.7, pairs)).astype(np.int64)
        lengths = np.stack([prefix, chosen, totals - prefix - chosen], axis=1)
        ends = totals.cumsum()
        tokens = quantiles[random.integers(0, 2**16, ends[-1], dtype=np.uint16)]
        counted = (np.arange(ends[-1]) - np.repeat(ends - totals, totals) >= np.repeat(prefix, totals)).astype(np.uint8)
        yield [
            EncodedPair(tokens[end - total : end], counted[end - total : end], tuple(parts), (0, first + line + 1))
            for line, (end, total, parts) in enumerate(zip(ends.tolist(), totals.tolist(), lengths.tolist(), strict=True))
        ]  # fmt: skip


def identity_of(max_length: int) -> Identity:
    """The identity of a cache without a model."""
    return Identity(
        format_version=FORMAT_VERSION, weights="w", family="llama", tokenizer="t", template="p", vocabulary=VOCABULARY,
        max_length=max_length, truncate="right", loss_on="response", think="keep", dtype="float32", attention="sdpa",
        block_pairs=BLOCK, per_token=False,
    )  # fmt: skip


def write(path: Path, count: int, length: int | None) -> dict[str, float]:
    """Figures of writing a cache as stage one does, with digests and flushing to disk, but without drawing the pairs."""
    identity = identity_of(8192)
    blocks = -(-count // BLOCK)
    sources = [Source("random", 1, "x", complete=True)]
    log = Log(model="random", created="2026-01-01", versions={}, sources=sources, blocks=blocks, pairs=count)
    cache = CacheWriter.create(path, Manifest(identity, log), lambda place: place.mkdir())
    random, seconds, tokens = np.random.default_rng(0), 0.0, 0
    for block, pairs in enumerate(random_blocks(count, length, random)):
        means = -random.random((len(pairs), 2)).astype(np.float32)
        started = time.perf_counter()
        table = PairTable.from_pairs(pairs, identity.token_dtype)
        cache.grow(block + 1)
        cache.write_pairs(block, table)
        cache.write_ref(block, RefBlock(means, table.token_counts))
        seconds += time.perf_counter() - started
        tokens += len(table.tokens)
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return {"tokens": tokens, "write s": seconds, "on disk MB": size / 1e6}
