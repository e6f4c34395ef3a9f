"""Measure the cost of the cache as it grows, without a model: `python -m benchmarks.growth --help`.

Pairs are random: token frequencies follow Zipf's law, lengths are log-normal with about 500 tokens per pair. Encoding uses real
rows, those of the sample repeated. Reading, feeding and inspecting are measured in a process each.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.random_cache import write
from minicache.cache.reader import ReferenceCache
from minicache.cache.schema import CachedPairs
from minicache.data.encode import Encoder
from minicache.data.files import read_rows
from minicache.data.formats import to_pair
from minicache.data.tokenizers import ChatTokenizer
from minicache.errors import RowRefused

SAMPLE = Path(__file__).parents[1] / "minicache" / "sample" / "train.jsonl"
LAYOUTS, BATCH_SIZES = ("packed", "padded", "shared"), (32, 256)


def main() -> None:
    options = parse()
    if options.child:
        print(json.dumps(CHILDREN[options.child](options)))
        return
    # not at the top: torch would count in the memory that the children measure
    from benchmarks.measure import command_line, machine

    report = {
        "machine": machine(),
        "command": command_line("growth"),
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
    parser.add_argument(
        "--lengths",
        type=numbers,
        default=[256, 1024, 4096, 8192],
        help="tokens per pair, the same for all pairs of a cache",
    )
    parser.add_argument(
        "--tokens", type=int, default=20_000_000, help="tokens of each cache in which all pairs have one length"
    )
    parser.add_argument("--tokenizer", help="a model with a tokenizer; without it encoding is not measured")
    parser.add_argument("--encode-rows", type=int, default=3000)
    parser.add_argument("--seconds", type=float, default=4.0, help="duration of each measurement of feeding")
    parser.add_argument("--work", type=Path, help="directory for temporary caches; a million pairs take 1.2 GB")
    parser.add_argument("--out", type=Path, help="also write the report here, as JSON")
    parser.add_argument("--child", choices=CHILDREN, help=argparse.SUPPRESS)
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def tokenizer_files(source: str, directory: Path) -> Path:
    """The directory of a model's tokenizer files, as a cache would hold it."""
    # not at the top: see `main`
    from minicache.models.load import save_tokenizer

    save_tokenizer(source, directory / "tokenizer", None)
    return directory / "tokenizer"


def encoding(source: str, count: int) -> dict[str, float]:
    """Figures of encoding rows as pairs with digests: the first half of stage one without reading the file."""
    with tempfile.TemporaryDirectory() as directory:
        encoder = Encoder(tokenizer=ChatTokenizer.load(tokenizer_files(source, Path(directory))), max_length=1024)
    sample = [to_pair(row, str(SAMPLE), line) for line, row in read_rows(str(SAMPLE)) if isinstance(row, dict)]
    rows = [sample[index % len(sample)] for index in range(count)]
    started, tokens = time.perf_counter(), 0
    for item in encoder.encode_all(rows, 0):
        assert not isinstance(item, RowRefused), item
        tokens += len(item[0].tokens) if item[0].digest else 0
    seconds = time.perf_counter() - started
    return {
        "pairs per second": len(rows) / seconds,
        "tokens per second": tokens / seconds,
        "tokens per pair": tokens / len(rows),
    }


# --- measurements, each in a process of its own ---


def measure(count: int, length: int | None, options: argparse.Namespace) -> dict[str, float]:
    """All figures of one cache, which is removed afterwards."""
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
    """VmRSS or VmHWM (its peak) of this process, MiB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def loading(options: argparse.Namespace) -> dict[str, float]:
    """Figures of loading a cache into memory."""
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
    """Pairs per second that training's batch thread lays out without waiting, by layout and pairs per step."""
    cache = ReferenceCache(options.cache)
    cached = cache.load()
    return {
        f"{layout} {size}, pairs/s": feed(cache, cached, layout, size, options.seconds)
        for layout in LAYOUTS
        for size in BATCH_SIZES
    }


def feed(cache: ReferenceCache, cached: CachedPairs, layout: str, size: int, seconds: float) -> float:
    """Pairs per second, in steps of `size` pairs."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from minicache.options.train import TrainConfig
    from minicache.processes.world import World
    from minicache.scoring.batching import ahead
    from minicache.scoring.scorer import Scorer
    from minicache.training.losses import Objective
    from minicache.training.order import Mixture
    from minicache.training.state import Run
    from minicache.training.step import plan

    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    config = TrainConfig(ref_cache=cache.path, out=cache.path, batch_size=size)
    run = Run(
        config=config,
        world=World(0, 1, torch.device("cpu")),
        scorer=Scorer(model, "float32", layout),
        objective=Objective.parse(config.loss, config.logps, config.beta, config.loss_options),
        cache=cache,
        cached=cached,
        training=Mixture.of([np.arange(len(cached.table))]),
        held_out=None,
        steps=sys.maxsize,
        budget=8192,
    )
    steps = ahead(plan(run, 0))
    next(steps)
    started, fed = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - started) < seconds:
        fed += sum(len(step.indices) for step in islice(steps, 1))
    steps.close()
    return fed / elapsed


CHILDREN = {"loading": loading, "feeding": feeding}


def show(report: dict) -> None:
    """Print the report as tables."""
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
    """A figure as text."""
    if value is None:
        return "not measured"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    main()
