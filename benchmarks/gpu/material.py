"""What checks run on: random models made on the device, pairs as long as real ones, runs of optimizer steps."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from benchmarks.case import SHAPES, qwen3_config, random_model
from benchmarks.gpu.figures import Machine
from minicache.cache.reader import ReferenceCache
from minicache.cache.schema import CachedPairs, RefBlock
from minicache.models.lora import add_lora
from minicache.models.precision import hold_for
from minicache.options.lora import LoraOptions
from minicache.options.train import TrainConfig
from minicache.pairs import EncodedPair, PairTable
from minicache.processes.devices import has_bfloat16
from minicache.scoring.batching import Indices, ahead
from minicache.scoring.budget import training_budget
from minicache.scoring.layout import settle_layout
from minicache.scoring.scorer import Scorer
from minicache.trackers import Silent
from minicache.training.losses import Objective
from minicache.training.order import Mixture
from minicache.training.snapshot import begin
from minicache.training.state import Run, Training
from minicache.training.step import plan, take_step

MAX_LENGTH, LR = 1024, 1e-6
NO_PLACE = Path("no-such-run")


@dataclass(frozen=True)
class Size:
    """A model: hidden, layers, heads, kv heads, intermediate, vocabulary. width: of a head, if it is not the usual one.

    rank: of the adapters that stage two trains; 0: all weights. unit: pairs of stage one that are timed at once. batch: pairs of an
    optimizer step.
    """

    shape: tuple[int, int, int, int, int, int]
    tied: bool = True
    width: int | None = None
    rank: int = 0
    unit: int = 512
    batch: int = 64

    @property
    def config(self) -> Any:
        """The config of the model, of Qwen3's family."""
        return qwen3_config(*self.shape, width=self.width, tied=self.tied)


SIZES = {
    "64M": Size(SHAPES["minimind-3"], unit=2048, batch=256),
    "0.6B": Size(SHAPES["qwen3-0.6b"]),
    "1.7B": Size(SHAPES["qwen3-1.7b"], unit=256, batch=32),
    "8B LoRA": Size((4096, 36, 32, 8, 12288, 151936), tied=False, rank=16, unit=128, batch=32),
}
# For values: wide enough for every kernel, and quick to make.
SMALL = Size((512, 4, 8, 2, 1536, 32000))


def half_of(machine: Machine) -> str:
    """The half precision of the device."""
    return "bfloat16" if has_bfloat16(machine.device) else "float16"


def size_here(machine: Machine, size: Size) -> Size:
    """The size, or a tiny one like it."""
    if not machine.tiny:
        return size
    shape = (64, 2, 4, 2, 96, 600)
    return Size(shape, size.tied, size.width and min(size.width, 16), min(size.rank, 4), unit=8, batch=4)


def make_model(machine: Machine, size: Size, dtype: str) -> Any:
    """The model with random weights in this precision, made on the device."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with machine.device:
            return random_model(size.config).to(machine.device)
    finally:
        torch.set_default_dtype(before)


def reference(machine: Machine, size: Size) -> Any:
    """A model as stage one holds it: frozen, in half precision."""
    half = half_of(machine)
    return hold_for(make_model(machine, size, half).requires_grad_(False), machine.device, half)


def policy(machine: Machine, size: Size) -> Any:
    """A model as stage two holds it: float32, or in half precision with adapters to train."""
    if not size.rank:
        return make_model(machine, size, "float32").requires_grad_(True)
    half = half_of(machine)
    frozen = make_model(machine, size, half).requires_grad_(False)
    return hold_for(add_lora(frozen, "", LoraOptions(lora_rank=size.rank), 0, Silent()), machine.device, half)


def make_pairs(machine: Machine, count: int, vocabulary: int, seed: int = 0) -> PairTable:
    """Pairs of random tokens as long as those of a chat file: prompts from a few tokens to most of a side, answers of about 250."""
    random, most = np.random.default_rng(seed), MAX_LENGTH // (16 if machine.tiny else 1)
    scale = most / MAX_LENGTH
    prefix = np.clip(random.lognormal(np.log(139 * scale), 1.1, count), 2, 0.75 * most)
    answers = np.clip(random.lognormal(np.log(250 * scale), 0.45, (2, count)), 2, most - prefix)
    lengths = np.stack([prefix, *answers], 1).astype(np.int64)
    return table_of(lengths, vocabulary, random)


def table_of(lengths: Indices, vocabulary: int, random: np.random.Generator) -> PairTable:
    """Pairs of random tokens whose answers count. lengths: (n, 3) of prefix, chosen, rejected."""
    made = []
    for line, parts in enumerate(lengths.tolist(), start=1):
        tokens = random.integers(1, vocabulary, sum(parts)).astype(np.int32)
        mask = (np.arange(len(tokens)) >= parts[0]).astype(np.uint8)
        made.append(EncodedPair(tokens, mask, tuple(parts), (0, line)))
    return PairTable.from_pairs(made, "int32")


class Notes(Silent):
    """Keeps what a stage notes."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


def make_run(
    machine: Machine,
    model: Any,
    table: PairTable,
    notes: Notes | None = None,
    means: Indices | None = None,
    **options: Any,
) -> Run:
    """A run as `train` prepares it, without a cache. means: (N, 2) of the reference; None: zeros."""
    notes, settings = notes or Notes(), {"dtype": half_of(machine), "log_every": 10**6, "lr": LR, **options}
    config = TrainConfig(ref_cache=NO_PLACE, out=NO_PLACE, **settings)
    scorer = Scorer(model, config.dtype)
    settle_layout(scorer, table, config.layout, machine.world, notes)
    cached = np.zeros((len(table), 2), np.float32) if means is None else means.astype(np.float32)
    return Run(
        config=config,
        world=machine.world,
        scorer=scorer,
        objective=Objective.parse(config.loss, config.logps, config.beta, config.loss_options),
        # it is read by checkpoints alone
        cache=cast(ReferenceCache, None),
        cached=CachedPairs(table, RefBlock(cached, table.token_counts)),
        training=Mixture.of([np.arange(len(table))]),
        held_out=None,
        steps=10**6,
        budget=config.tokens_per_micro_batch
        or training_budget(scorer, table, config.optimizer, config.activation_checkpointing, machine.world, notes),
    )


def steps_of(run: Run) -> Iterator[Callable[[], Indices]]:
    """The run's optimizer steps, one after another: each call takes one and returns its pairs. Only the first is logged."""
    training = begin(run, None)
    for mine in ahead(plan(run, 0)):
        yield lambda mine=mine: _step(run, training, mine)  # type: ignore[misc]


def _step(run: Run, training: Training, mine: Any) -> Indices:
    take_step(run, training, mine)
    training.progress.step += 1
    indices: Indices = mine.indices
    return indices


def tokens_of(table: PairTable, indices: Indices) -> int:
    """Distinct tokens: a prefix counts once."""
    return int(table.lengths[indices].sum())
