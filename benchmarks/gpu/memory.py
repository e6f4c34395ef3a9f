"""The memory that `minidpo fit` counts: which sizes fit this card, and what the allocator gives out beside it."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial
from tempfile import TemporaryDirectory

import numpy as np
import torch

from benchmarks.gpu.figures import Figure, Machine, attempt, within
from benchmarks.gpu.material import (
    MAX_LENGTH,
    SIZES,
    Size,
    half_of,
    make_run,
    policy,
    reference,
    size_here,
    steps_of,
    table_of,
)  # fmt: skip
from minicache.options.fit import FitConfig
from minicache.options.lora import NO_LORA, LoraOptions
from minicache.pairs import PairTable
from minicache.processes.devices import free_memory
from minicache.scoring.counting import counted_pass
from minicache.scoring.memory import How, Need, need_of
from minicache.scoring.scorer import Scorer
from minicache.stages import fit as fits
from minicache.stages.train import _save_memory_and_time
from minicache.trackers import Silent

# Of the CPU in its place.
TINY_MEMORY = "8GB"
# Of a micro-batch.
PAIRS = 4


@cache
def room_for(machine: Machine, size: Size) -> dict[str, dict[str, int]]:
    """Stage -> way -> token slots for which this card has room, 0 if there is none; ways in the order of preference."""
    memory = f"{free_memory(machine.device) / 1e9:.3f}GB" if machine.has_cuda else TINY_MEMORY
    lora = LoraOptions(lora_rank=size.rank) if size.rank else NO_LORA
    with TemporaryDirectory() as directory:
        settings = size.config
        settings.dtype = half_of(machine)
        settings.save_pretrained(directory)
        config = FitConfig(directory, max_length=MAX_LENGTH, memory=(memory,), dtype=half_of(machine), lora=lora)
        report = fits.fit(config, machine.world, Silent())
    stages = {"precompute-ref": "stage one", "train": "stage two"}
    found: dict[str, dict[str, int]] = {stage: {} for stage in stages.values()}
    for way in report.ways:
        # bases in 4 bits, and adapters where all weights are asked for, are other ways
        if way.name == "the reference" or (way.stage == "train" and (way.name == "all weights" or size.rank)):
            name = way.name + (", layers computed again" if way.checkpointing else "")
            found[stages[way.stage]][name] = way.room[memory]
    return found


def fit(machine: Machine) -> Iterator[Figure]:
    """Bytes of a stage at its peak, by count and by the allocator, of a 0.6B model."""
    size = size_here(machine, SIZES["0.6B"])
    adapters = replace(size, rank=4 if machine.tiny else 16)
    ways: dict[str, tuple[Size, bool, bool]] = {
        "stage one": (size, False, False),
        "all weights": (size, True, False),
        "all weights, layers computed again": (size, True, True),
        "adapters": (adapters, True, False),
    }
    for name, way in ways.items():
        yield from attempt(name, partial(_beside, machine, name, *way))
    machine.needs_gpu("the allocator's peak")


def _beside(machine: Machine, name: str, size: Size, training: bool, again: bool) -> Iterator[Figure]:
    before = torch.cuda.memory_allocated() if machine.has_cuda else 0
    lengths = np.array([[384, 512, 512]] * 2 * PAIRS) // (16 if machine.tiny else 1)
    table = table_of(lengths, size.shape[-1], np.random.default_rng(0))
    model, slots = policy(machine, size) if training else reference(machine, size), PAIRS * int(lengths[0].sum())
    options = {"layout": "packed", "batch_size": 2 * PAIRS, "tokens_per_micro_batch": slots}
    run = make_run(machine, model, table, activation_checkpointing=again, **options)
    counted = _counted(run.scorer, table, How(training=training, checkpointing=again, kind="cuda"))
    foreseen = counted.weights + counted.state + counted.passes.bytes(slots)
    yield Figure(f"{name}: counted", foreseen / 1e9, "GB")
    if training:
        _save_memory_and_time(run)
        steps = steps_of(run)
        # the first makes the optimizer's state
        works = [next(steps) for _ in range(3)]
    else:
        batch = run.scorer.batch(table, np.arange(PAIRS)).to(machine.device)
        works = 3 * [torch.no_grad()(lambda: run.scorer(batch))]
    for work in works:
        if machine.has_cuda:
            torch.cuda.reset_peak_memory_stats()
        work()
    if machine.has_cuda:
        peak = torch.cuda.max_memory_allocated() - before
        yield Figure(f"{name}: allocated", peak / 1e9, "GB")
        yield within(f"{name}: counted over allocated", foreseen / peak, 0.1)


def _counted(scorer: Scorer, table: PairTable, how: How) -> Need:
    one, two = (scorer.layout.make(table, np.arange(pairs)) for pairs in (1, 2))
    return need_of(scorer, counted_pass(scorer, one, two, how), "adamw" if how.training else None)
