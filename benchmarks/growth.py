"""What the cache itself costs, without a model, as it grows: `python -m benchmarks.growth --help`.

Pairs are drawn at random: tokens as rare as a language's, lengths log-normal about 500 tokens a pair. Encoding alone takes
real rows, those of the sample over and over. Reading, feeding and inspecting are timed each in a process of its own.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from minicache.cache.identity import FORMAT_VERSION, Identity
from minicache.cache.manifest import Log, Manifest, Source
from minicache.cache.reader import ReferenceCache
from minicache.cache.schema import CachedPairs, RefBlock
from minicache.cache.writer import CacheWriter
from minicache.data.encode import Encoder
from minicache.data.files import read_rows
from minicache.data.formats import to_pair
from minicache.data.tokenizers import ChatTokenizer
from minicache.errors import RowRefused
from minicache.pairs import EncodedPair, PairTable

VOCABULARY, BLOCK = 49152, 4096
SAMPLE = Path(__file__).parents[1] / "minicache" / "sample" / "train.jsonl"
LAYOUTS, BATCH_SIZES = ("packed", "padded", "shared"), (32, 256)


def main() -> None:
    options = parse()
    if options.child:
        print(json.dumps(CHILDREN[options.child](options)))
        return
    from benchmarks.measure import machine  # not above: torch would be in the memory that the children measure

    report = {
        "machine": machine(),
        "command": " ".join(["python -m benchmarks.growth", *sys.argv[1:]]),
        "encode": encoding(options.tokenizer, options.encode_rows)
        if options.tokenizer
        else "not measured: no --tokenizer",
        "pairs": [measure(count, None, options) for count in options.pairs],
        "length": [measure(max(1, options.tokens // length), length, options) for length in options.lengths],
    }
    show(report)
    if options.out:
        options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    numbers: Callable[[str], list[int]] = lambda text: [int(number) for number in text.split(",") if number]  # noqa: E731
    parser.add_argument("--pairs", type=numbers, default=[1000, 10_000, 100_000, 1_000_000], help="sizes of caches")
    parser.add_argument("--lengths", type=numbers, default=[256, 1024, 4096, 8192], help="tokens a pair, all alike")
    parser.add_argument("--tokens", type=int, default=20_000_000, help="of each cache of pairs of one length")
    parser.add_argument("--tokenizer", help="a model that has one; without it encoding is not measured")
    parser.add_argument("--encode-rows", type=int, default=3000)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement of feeding")
    parser.add_argument("--work", type=Path, help="where caches are made and removed; a million pairs take 1.2 GB")
    parser.add_argument("--out", type=Path, help="also write the report here, as JSON")
    parser.add_argument("--child", choices=CHILDREN, help=argparse.SUPPRESS)
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def tokenizer_files(source: str, directory: Path) -> Path:
    """The tokenizer of a model as it would lie in a cache. In here for what it imports: see `main`."""
    from minicache.models.load import save_tokenizer

    save_tokenizer(source, directory / "tokenizer", None)
    return directory / "tokenizer"


def encoding(source: str, count: int) -> dict[str, float]:
    """Rows of text to pairs of ids, digests included: the first half of stage one but for reading the file."""
    with tempfile.TemporaryDirectory() as directory:
        encoder = Encoder(ChatTokenizer.load(tokenizer_files(source, Path(directory))), 1024)
    sample = [to_pair(row, str(SAMPLE), line) for line, row in read_rows(str(SAMPLE)) if isinstance(row, dict)]
    rows = [sample[index % len(sample)] for index in range(count)]
    started, tokens = time.perf_counter(), 0
    for item in encoder.encode_all(rows, 0):
        assert not isinstance(item, RowRefused), item
        tokens += len(item[0].tokens) if item[0].digest else 0
    seconds = time.perf_counter() - started
    return {
        "pairs a second": len(rows) / seconds,
        "tokens a second": tokens / seconds,
        "tokens a pair": tokens / len(rows),
    }


# --- a cache of random pairs ---


def random_blocks(count: int, length: int | None, random: np.random.Generator) -> Iterator[list[EncodedPair]]:
    """Blocks of pairs. length: tokens of every pair; None draws them."""
    quantiles = np.exp(np.linspace(0, np.log(VOCABULARY), 2**16, endpoint=False)).astype(np.uint16)  # Zipf's law
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
    """Of a cache that no model made."""
    return Identity(
        format_version=FORMAT_VERSION, weights="w", family="llama", tokenizer="t", template="p", vocabulary=VOCABULARY,
        max_length=max_length, truncate="right", loss_on="response", think="keep", dtype="float32", attention="sdpa",
        block_pairs=BLOCK, per_token=False,
    )  # fmt: skip


def write(path: Path, count: int, length: int | None) -> dict[str, float]:
    """Make the cache as stage one does, digests and flushing to disk included; drawing the pairs is not timed."""
    identity = identity_of(8192)
    blocks = -(-count // BLOCK)
    log = Log("random", "2026-01-01", {}, [Source("random", 1, "x", complete=True)], blocks, count)
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


# --- measurements, each in a process of its own ---


def measure(count: int, length: int | None, options: argparse.Namespace) -> dict[str, float]:
    """Every figure of one cache, which is removed afterwards."""
    work = Path(tempfile.mkdtemp(prefix="growth-", dir=options.work))
    try:
        row = {"pairs": count, **({} if length is None else {"length": length}), **write(work / "cache", count, length)}
        started = time.perf_counter()
        command = [sys.executable, "-m", "minicache", "inspect-cache", str(work / "cache"), "--json"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        row["inspect s"] = time.perf_counter() - started
        for child in CHILDREN:
            arguments = ["--child", child, "--cache", str(work / "cache"), "--seconds", str(options.seconds)]
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.growth", *arguments], check=True, capture_output=True, text=True
            )
            row |= json.loads(done.stdout)
        print(json.dumps(row), file=sys.stderr)
        return row
    finally:
        shutil.rmtree(work)


def memory(field: str) -> float:
    """VmRSS or VmHWM (its peak) of this process, MB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def loading(options: argparse.Namespace) -> dict[str, float]:
    before, started = memory("VmRSS"), time.perf_counter()
    cached = ReferenceCache(options.cache).load()
    seconds = time.perf_counter() - started
    arrays = [*vars(cached.table).values(), cached.reference.logp_mean, cached.reference.token_count]
    held = sum(array.nbytes for array in arrays) / 2**20
    peak = memory("VmHWM") - before
    started = time.perf_counter()
    assert cached.table.token_counts.any() and cached.table.offsets.any()
    return {
        "load s": seconds,
        "load MB": held,
        "load peak MB": peak,
        "counts s": time.perf_counter() - started,
        "counts peak MB": memory("VmHWM") - before,
    }


def feeding(options: argparse.Namespace) -> dict[str, float]:
    """Pairs a second that training's own thread lays out, with nothing to wait for; by layout and pairs a step."""
    cache = ReferenceCache(options.cache)
    cached = cache.load()
    return {
        f"{layout} {size}, pairs/s": feed(cache, cached, layout, size, options.seconds)
        for layout in LAYOUTS
        for size in BATCH_SIZES
    }


def feed(cache: ReferenceCache, cached: CachedPairs, layout: str, size: int, seconds: float) -> float:
    """Pairs a second of steps of `size` pairs."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from minicache.options.train import TrainConfig
    from minicache.processes.world import World
    from minicache.scoring.batching import ahead
    from minicache.scoring.scorer import Scorer
    from minicache.training.losses import Objective
    from minicache.training.state import Run
    from minicache.training.step import plan

    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    world, everything = World(0, 1, torch.device("cpu")), np.arange(len(cached.table))
    scorer = Scorer(model, "float32", layout)
    config = TrainConfig(cache.path, cache.path, batch_size=size)
    objective = Objective.parse(config.loss, config.logps, config.beta, config.loss_options)
    run = Run(config, world, scorer, objective, cache, cached, everything, None, sys.maxsize, 8192)
    steps = ahead(plan(run, 0))
    next(steps)
    started, fed = time.perf_counter(), 0
    while (taken := time.perf_counter() - started) < seconds:
        fed += sum(len(step.indices) for step in islice(steps, 1))
    steps.close()
    return fed / taken


CHILDREN = {"loading": loading, "feeding": feeding}


def show(report: dict) -> None:
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print("encode", report["encode"])
    for axis in ("pairs", "length"):
        rows = report[axis]
        if not rows:
            continue
        table = Table(title=f"by {axis}")
        for heading in ("", *(f"{row[axis]:,}" for row in rows)):
            table.add_column(heading, justify="right")
        for name in dict.fromkeys(name for row in rows for name in row):
            table.add_row(name, *(figure(row.get(name)) for row in rows))
        console.print(table)


def figure(value: float | None) -> str:
    if value is None:
        return "not measured"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    main()
