"""The token slots of one pass, from the free memory and from what the model needs: the same arithmetic in both stages and in `fit`."""

import logging
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from minicache.errors import ModelError
from minicache.models import layers_of
from minicache.options.catalog import OPTIMIZERS
from minicache.pairs import PairTable
from minicache.processes.world import World
from minicache.scoring.batch import Batch
from minicache.scoring.memory import How, Pass, bytes_of, counted_pass, run_pass
from minicache.scoring.scorer import DTYPES, Scorer
from minicache.scoring.tables import SLOTS
from minicache.text import one_line
from minicache.trackers import Tracker

log = logging.getLogger(__name__)

# More slots make no step faster, because the device is busy already.
MOST = {"cpu": 8192, "cuda": 65536}
# Share of the free memory to use; the rest is for fragmentation and for what the count misses.
RESERVE = 0.85


@dataclass(frozen=True)
class Need:
    """Bytes that a stage needs on each device.

    weights, gradients, optimizer: of this device's share. copies: DDP's buckets, or what FSDP gathers and reduces at once.
    """

    weights: float
    gradients: float
    optimizer: float
    copies: float
    passes: Pass

    @property
    def state(self) -> float:
        """What stays from step to step beside the weights."""
        return self.gradients + self.optimizer + self.copies

    def slots(self, free: float) -> int:
        """Token slots for which this many bytes, without the weights, suffice."""
        low, high = 0, 2**24
        while low < high:
            middle = (low + high + 1) // 2
            fits = self.state + self.passes.bytes(middle) <= free
            low, high = (middle, high) if fits else (low, middle - 1)
        return low

    def power(self, free: float, most: int) -> int:
        """The same as a power of two of at least 1, so that small differences in free memory change nothing."""
        return min(most, 1 << max(0, self.slots(free).bit_length() - 1))


def need_of(scorer: Scorer, passes: Pass, optimizer: str | None, processes: int) -> Need:
    """What each of `processes` devices needs. optimizer: a name in OPTIMIZERS; None: nothing is trained."""
    weights = {id(each): each for each in scorer.parameters()}.values()
    trained = sum(each.numel() for each in weights if each.requires_grad) if optimizer else 0
    state = OPTIMIZERS[optimizer].state_bytes if optimizer else 0.0
    if scorer.shards == 1:
        held, gradients = float(bytes_of(weights)), 4.0 * trained
        # DDP keeps a second set of gradients to send
        copies = gradients if processes > 1 else 0.0
    else:
        held, gradients = bytes_of(weights) / scorer.shards, 4 * trained / scorer.shards
        copies = _gathered(scorer, bool(optimizer))
    return Need(held, gradients, state * trained / scorer.shards, copies, passes)


def _gathered(scorer: Scorer, training: bool) -> float:
    """Bytes of the shards that FSDP gathers: the root's in float32, and two layers in the precision of the passes.

    While one layer computes, the next is gathered. In backward their gradients are there too, and in float32 while they are
    reduced; the root's gradients are whole until its backward ends.
    """
    layers = [list(layer.parameters()) for layer in layers_of(scorer.model)]
    inner = {id(each) for layer in layers for each in layer}
    root = {id(each): each for each in scorer.parameters() if id(each) not in inner}.values()
    size = DTYPES[scorer.dtype].itemsize
    largest = max(layers, key=lambda layer: sum(each.numel() for each in layer))
    trained = sum(each.numel() for each in largest if each.requires_grad)
    total = 4.0 * sum(each.numel() for each in root) + 2.0 * size * sum(each.numel() for each in largest)
    if training:
        total += 2 * 4 * sum(each.numel() for each in root if each.requires_grad) + (size + 4) * trained
    return total


def training_budget(
    scorer: Scorer, table: PairTable, optimizer: str, checkpointing: bool, world: World, tracker: Tracker
) -> int:
    """Token slots of a micro-batch, the same on all processes, which must all call this.

    optimizer: a name in OPTIMIZERS. checkpointing: whether layers will be computed again in backward; this must not be in effect
    yet.

    Raises:
        ModelError: the longest pair does not fit in memory.
    """
    how = How(training=True, checkpointing=checkpointing, kind=world.device.type, sharded=scorer.shards > 1)
    return _budget(scorer, table, optimizer, how, world, tracker)


def scoring_budget(scorer: Scorer, table: PairTable, world: World, tracker: Tracker) -> int:
    """Token slots of a forward pass without gradients, the same on all processes, which must all call this.

    table: it must hold the longest pair.

    Raises:
        ModelError: the longest pair does not fit in memory.
    """
    how = How(training=False, kind=world.device.type, sharded=scorer.shards > 1)
    return _budget(scorer, table, None, how, world, tracker)


def _budget(scorer: Scorer, table: PairTable, optimizer: str | None, how: How, world: World, tracker: Tracker) -> int:
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
    need = need_of(scorer.outline, _passes_of(scorer, table, how, world.device), optimizer, world.size)
    free = free_bytes(world.device, local)
    most = (MOST if how.training else SLOTS).get(world.device.type, MOST["cpu"])
    found = world.gather((need.slots(free), need.power(RESERVE * free, most), free))
    fits, slots, free = min(found)
    pass_ = "micro-batch" if how.training else "batch"
    longest = need.passes.slots
    if fits < longest:
        raise ModelError(
            f"the longest pair, {longest:,} token slots, does not fit in memory: it needs {gigabytes(need.passes.bytes(longest))}, beside "
            f"{parts_of(need)}; {gigabytes(free)} are free beside the weights. "
            + (ADVICE if how.training else "Lower --max-length, or add --parallel fsdp on several devices")
        )
    slots = min(each for _, each, _ in found)
    tracker.note(
        f"{slots:,} token slots a {pass_} take {gigabytes(need.passes.bytes(slots))}, beside {parts_of(need)}; "
        f"{gigabytes(free)} are free"
    )
    return slots


ADVICE = "Try --activation-checkpointing, --optimizer adamw-8bit or --lora-rank 16 (minidpo fit --model shows what each needs)"


def parts_of(need: Need) -> str:
    """What stays from step to step beside the weights, as text."""
    parts = {"gradients": need.gradients, "the optimizer": need.optimizer, "copies between processes": need.copies}
    return ", ".join(f"{gigabytes(size)} for {name}" for name, size in parts.items() if size) or "nothing"


def gigabytes(size: float) -> str:
    """A size as text: in GB, or smaller units, of powers of ten."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{size / unit:,.1f} {name}"
    return f"{size:,.0f} bytes"


def _passes_of(scorer: Scorer, table: PairTable, how: How, device: torch.device) -> Pass:
    """The memory of passes over pairs as long as the table's longest; where it cannot be counted, from passes that run."""
    costs = scorer.layout.costs(table.lengths)
    try:
        return counted_pass(scorer.outline, *_one_and_two(scorer, table, int(costs.argmax())), how)
    # a family's own code, which may read the values of tensors, may raise anything
    except Exception as error:
        log.debug("memory is measured, because it cannot be counted: %s", one_line(error, 300))
    try:
        batches = (each.to(device) for each in _one_and_two(scorer, table, int(costs.argmin())))
        found = run_pass(scorer, *batches, how)
    except torch.OutOfMemoryError as error:
        raise ModelError(f"the shortest pair, {int(costs.min()):,} token slots, does not fit in memory") from error
    return found.longer(int(costs.max()))


def _one_and_two(scorer: Scorer, table: PairTable, index: int) -> tuple[Batch, Batch]:
    """A batch of this pair, and one of it twice."""
    one, two = (scorer.layout.make(table, np.full(pairs, index)) for pairs in (1, 2))
    return one, two


def free_bytes(device: torch.device, processes: int = 1) -> float:
    """Free bytes on the device; on a CPU, the equal share of one of `processes`. Infinite if the system does not report it."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(_machine_bytes(), job_bytes()) / processes


def _machine_bytes() -> float:
    try:
        (line,) = (line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
        return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return float("inf")


def job_bytes(groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float:
    """Bytes that this process's control groups (of a container or batch job) still allow. Infinite without a limit.

    The kernel can reclaim cached pages of files, which count as free. Source: docs.kernel.org/admin-guide/cgroup-v2.html, memory.
    """
    try:
        (path,) = (line[3:] for line in own.read_text().splitlines() if line.startswith("0::"))
    except (OSError, ValueError):
        return float("inf")
    place, room = groups / path.lstrip("/"), float("inf")
    for group in (place, *place.parents):
        try:
            limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
            held = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            room = min(room, limit - used + int(held["inactive_file"]) + int(held["active_file"]))
        # this group has no limit
        except (OSError, ValueError, KeyError):
            continue
    return max(0.0, room)
