"""What `minidpo fit` says of Qwen3's sizes: python -m benchmarks.fits writes the tables of docs/memory.md."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from minicache.options.fit import FitConfig
from minicache.processes.world import World
from minicache.stages.fit import CARDS, FitReport, Way, fit
from minicache.trackers import Silent

PAGE = Path(__file__).parents[1] / "docs" / "memory.md"
# hidden, layers, heads, intermediate, tied embeddings; from the models' configs
SIZES = {
    "0.6B": (1024, 28, 16, 3072, True),
    "1.7B": (2048, 28, 16, 6144, True),
    "4B": (2560, 36, 32, 9728, True),
    "8B": (4096, 36, 32, 12288, False),
}
DEVICES = {"": FitConfig("", memory=CARDS), " × 8": FitConfig("", memory=CARDS, nproc=8, parallel="fsdp")}


def config_of(size: str) -> dict[str, object]:
    """Qwen3's config.json of this size."""
    hidden, layers, heads, intermediate, tied = SIZES[size]
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "dtype": "bfloat16",
        "vocab_size": 151936,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": tied,
    }


def reports() -> Iterator[tuple[str, FitReport]]:
    """The name of a size and devices, and what `fit` says."""
    with TemporaryDirectory() as directory:
        for size in SIZES:
            (Path(directory) / "config.json").write_text(json.dumps(config_of(size)))
            for devices, asked in DEVICES.items():
                yield size + devices, fit(replace(asked, model=directory), World(0, 1, torch.device("cpu")), Silent())


def ways_of(report: FitReport) -> Iterator[tuple[Way, Way | None]]:
    """Each way, and the same with layers computed again."""
    again = {way.name: way for way in report.ways if way.checkpointing}
    yield from ((way, again.get(way.name)) for way in report.ways if not way.checkpointing)


def needs(report: FitReport) -> Iterator[str]:
    """The rows of the first table, without the model's name."""
    for way, again in ways_of(report):
        cells = [f"{each / 1e9:.2f}" for each in (way.weights, way.gradients, way.optimizer)]
        cells += [f"{way.copies / 1e9:.2f}" if way.copies else "0", f"{way.head / 1e9:.2f}", f"{way.fixed / 1e9:.2f}"]
        yield " | ".join([way.name, *cells, f"{way.slot / 1e6:.2f}", f"{again.slot / 1e6:.2f}" if again else ""])


def rooms(report: FitReport) -> Iterator[str]:
    """The rows of the second table, without the model's name."""
    for way, again in ways_of(report):
        each = [[f"{it.room[card]:,}" if it.room[card] else "–" for it in (way, again) if it] for card in CARDS]
        yield " | ".join([way.name, *(" / ".join(cell) for cell in each)])


def main() -> None:
    found = list(reports())
    first, second = (
        "".join(f"| {name} | {row} |\n" for name, report in found for row in rows(report)) for rows in (needs, rooms)
    )
    page = PAGE.read_text(encoding="utf-8")
    bodies = iter((first, second))
    # a table that begins with the model's name: its head stays
    pattern = r"(\| model \| \|.*\n\|[ \-|]+\n)(?:\|.*\n)*"
    page, count = re.subn(pattern, lambda match: match[1] + next(bodies), page)
    assert count == 2, f"{PAGE}: expected two tables, found {count}"
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
