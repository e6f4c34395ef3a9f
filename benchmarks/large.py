"""Measure speed and memory from text to batches for many pairs: `python -m benchmarks.large --help`.

Rows are random sentences of the sample, about 500 stored tokens per pair. They are encoded on all cores into a cache, as in stage
one. The logprobs are random, because a model would not change the memory measured here. Then the pairs are decoded and fed as in
training, from memory and from a scratch file. Each part runs in a process of its own.

Memory is the anonymous memory of the process (without mapped pages of a scratch file, which the system can reclaim), above that
at its start.
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread

import numpy as np

from benchmarks.growth import SAMPLE, feed, tokenizer_files
from benchmarks.measure import machine
from benchmarks.random_cache import identity_of, write
from minicache.cache.manifest import Log, Manifest
from minicache.cache.reader import ReferenceCache
from minicache.cache.schema import RefBlock
from minicache.cache.writer import CacheWriter
from minicache.data import workers
from minicache.data.encode import Encoder
from minicache.data.files import DataFile
from minicache.data.tokenizers import ChatTokenizer
from minicache.intake.blocks import hash_files, take_in
from minicache.trackers import Silent

FEEDING_SECONDS = 8.0


def main() -> None:
    options = parse()
    if options.child:
        print(json.dumps(CHILDREN[options.child](options)))
        return
    with tempfile.TemporaryDirectory(prefix="large-", dir=options.work) as work:
        report: dict = {"machine": machine(), "pairs": options.pairs}
        arguments = [*sys.argv[1:], "--work", work]
        if options.tokenizer:
            arguments += ["--tokenizer", str(tokenizer_files(options.tokenizer, Path(work)))]
        for child in [*(ENCODED if options.tokenizer else DRAWN), *TRAINING]:
            command = [sys.executable, "-m", "benchmarks.large", *arguments, "--child", child]
            report[child] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
            print(child, json.dumps(report[child]), flush=True)
    if options.out:
        options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--tokenizer", help="a model with a tokenizer; without it the pairs are random tokens")
    parser.add_argument("--words", type=int, default=190, help="mean number of words of a pair")
    parser.add_argument("--workers", type=int, default=workers.MOST, help="processes that encode, at most one per core")
    parser.add_argument("--work", type=Path, help="directory for temporary files; a million pairs take 7 GB")
    parser.add_argument("--out", type=Path, help="also write the report here, as JSON")
    parser.add_argument("--child", choices=CHILDREN, help=argparse.SUPPRESS)
    return parser.parse_args()


class Peak:
    """Context that measures peak anonymous memory, MiB. own: above that at its start. children: of all child processes."""

    def __enter__(self) -> "Peak":
        self.own = self.children = 0.0
        self._before, self._ended = anonymous("self"), Event()
        self._thread = Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._ended.wait(0.05):
            self._look()

    def _look(self) -> None:
        self.own = max(self.own, anonymous("self") - self._before)
        # the main thread starts the children
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        self.children = max(self.children, sum(map(anonymous, children)))


def anonymous(process: str) -> float:
    """Anonymous memory of a process, MiB; 0 if it has ended."""
    try:
        return int(re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{process}/status").read_text())[1]) / 1024  # type: ignore[index]
    except (OSError, TypeError):
        return 0.0


# --- the parts ---


def text(options: argparse.Namespace) -> dict[str, float]:
    """Write the rows as jsonl."""
    sentences = [
        sentence + " "
        for line in SAMPLE.read_text(encoding="utf-8").splitlines()
        for turn in json.loads(line)["chosen"]
        for sentence in re.split(r"(?<=[.!?])\s+", turn["content"])
    ]
    words = sum(len(sentence.split()) for sentence in sentences) / len(sentences)
    draw, mean = random.Random(0), options.words / words / 3
    file, started = options.work / "pairs.jsonl", time.perf_counter()
    with file.open("w", encoding="utf-8") as stream:
        for _ in range(options.pairs):
            sides = ["".join(draw.choices(sentences, k=1 + int(draw.lognormvariate(0, 0.5) * mean))) for _ in range(3)]
            stream.write(json.dumps(dict(zip(("prompt", "chosen", "rejected"), sides, strict=True))) + "\n")
    return {"MB": file.stat().st_size / 1e6, "s": time.perf_counter() - started}


def encoding(options: argparse.Namespace) -> dict[str, float]:
    """Encode the rows: the first half of stage one, from the file on disk to blocks of the cache on disk."""
    identity = identity_of(2048)
    encoder = Encoder(tokenizer=ChatTokenizer.load(Path(options.tokenizer)), max_length=identity.max_length)
    path, file = options.work / "cache", str(options.work / "pairs.jsonl")
    cache = CacheWriter.create(
        path, Manifest(identity, Log(model="m", created="d", versions={})), lambda place: place.mkdir()
    )
    workers.MOST = options.workers
    given, started, cpu = hash_files([DataFile(file, Path(file))]), time.perf_counter(), time.process_time()
    with Peak() as peak:
        take_in(cache, encoder, given, "auto", False, Silent())
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    pairs, tokens = np.array([cache.blocks.size(block) for block in range(len(cache.blocks))]).sum(0).tolist()
    return {
        "workers": min(workers.MOST, workers._cores()),
        "pairs": pairs,
        "s": seconds,
        "pairs/s": pairs / seconds,
        "tokens": tokens,
        "tokens/s": tokens / seconds,
        # with many workers, this bounds the speed
        "own CPU s": cpu,
        "own MB": peak.own,
        "workers MB": peak.children,
    }


def scoring(options: argparse.Namespace) -> dict[str, float]:
    """Write random logprobs."""
    cache, draw, started = CacheWriter(options.work / "cache"), np.random.default_rng(0), time.perf_counter()
    for block in range(len(cache.blocks)):
        table = cache.blocks.pairs(block)
        cache.write_ref(block, RefBlock(-draw.random((len(table), 2)).astype(np.float32), table.token_counts))
    return {"s": time.perf_counter() - started}


def drawing(options: argparse.Namespace) -> dict[str, float]:
    """Write the cache of random pairs of benchmarks/random_cache.py."""
    return write(options.work / "cache", options.pairs, None)


def from_memory(options: argparse.Namespace) -> dict[str, float]:
    return training(options, None)


def from_a_file(options: argparse.Namespace) -> dict[str, float]:
    return training(options, options.work)


def training(options: argparse.Namespace, scratch: Path | None) -> dict[str, float]:
    """Decode the pairs, and feed them as in training."""
    import torch

    # `feed` imports it: imported here, it does not count in the memory measured
    from transformers import LlamaForCausalLM  # noqa: F401

    from minicache.processes.world import World
    from minicache.scoring.loading import load_pairs

    cache, world, started = (
        ReferenceCache(options.work / "cache"),
        World(0, 1, torch.device("cpu")),
        time.perf_counter(),
    )
    with Peak() as peak:
        cached = load_pairs(cache, scratch, world, Silent())
    seconds, loading = time.perf_counter() - started, peak.own
    with peak:
        fed = feed(cache, cached, "packed", 32, FEEDING_SECONDS)
    return {
        "decoded MB": cache.contents.decoded_bytes / 2**20,
        "load s": seconds,
        "load MB": loading,
        "fed pairs/s": fed,
        "feeding MB": peak.own,
    }


ENCODED, DRAWN, TRAINING = ("text", "encoding", "scoring"), ("drawing",), ("from_memory", "from_a_file")
CHILDREN: dict[str, Callable[[argparse.Namespace], dict[str, float]]] = {
    function.__name__: function for function in (text, encoding, scoring, drawing, from_memory, from_a_file)
}

if __name__ == "__main__":
    main()
