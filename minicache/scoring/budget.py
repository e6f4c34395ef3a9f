"""The token slots of one pass, from the free memory and from what the model needs, the same on all processes of a run."""

import logging

import numpy as np
import torch

from minicache.errors import FullMemory, ModelError, fits
from minicache.machine import free_bytes_here
from minicache.models import layers_of
from minicache.pairs import PairTable
from minicache.processes.devices import by_kind, free_memory
from minicache.processes.world import World
from minicache.scoring.batch import Batch, Movable
from minicache.scoring.counting import counted_pass, is_fused, run_pass
from minicache.scoring.memory import TO_SCORE, TO_TRAIN, How, Need, Pass, gigabytes, need_of, parts_of
from minicache.scoring.scorer import Scorer
from minicache.scoring.tables import SLOTS
from minicache.text import one_line
from minicache.trackers import Tracker

log = logging.getLogger(__name__)

# More slots make no step faster, because the device is busy already.
MOST = {"cpu": 8192, "cuda": 65536}
# Share of the free memory to use; the rest is for fragmentation and for what the count misses.
RESERVE = 0.85
# Passes that were counted in this process, by `_sizes_of`: the runs of a sweep are alike.
COUNTED: dict[tuple[object, ...], Pass] = {}


def training_budget(
    scorer: Scorer, table: PairTable, optimizer: str, checkpointing: bool, world: World, tracker: Tracker
) -> int:
    """Token slots of a micro-batch, the same on all processes, which must all call this.

    optimizer: a name in OPTIMIZERS. checkpointing: whether layers will be computed again in backward; this must not be in effect
    yet.

    Raises:
        ModelError: the longest pair does not fit in memory.
    """
    return _budget(scorer, table, optimizer, _how(scorer, world, True, checkpointing), world, tracker)


def scoring_budget(scorer: Scorer, table: PairTable, world: World, tracker: Tracker) -> int:
    """Token slots of a forward pass without gradients, the same on all processes, which must all call this.

    table: it must hold the longest pair.

    Raises:
        ModelError: the longest pair does not fit in memory.
    """
    return _budget(scorer, table, None, _how(scorer, world, training=False), world, tracker)


def layers_that_fit(
    scorer: Scorer, table: PairTable, optimizer: str, slots: int, world: World, tracker: Tracker
) -> int:
    """The number of decoder layers that need not be computed again, the same on all processes, which must all call this.

    Their activations fit beside all else of a micro-batch of so many token slots. See `checkpoint_activations`.

    Raises:
        ModelError: the model's code does not mark its layers.
    """
    count = len(layers_of(scorer.model))
    if not count:
        raise ModelError("--selective-checkpointing: this model's code marks no layers for it; leave it off")

    def find() -> int:
        least, most = (
            need_of(
                scorer.outline, _passes_of(scorer, table, _how(scorer, world, True, again), world.device), optimizer
            )
            for again in (True, False)
        )
        room = RESERVE * free_bytes(world.device, world.local_size) - least.state - least.passes.bytes(slots)
        a_layer = (most.passes.bytes(slots) - least.passes.bytes(slots)) / count
        return max(0, min(count, int(room / max(a_layer, 1))))

    kept: int = min(world.together(find, meets=bool(scorer.lockstep)))
    tracker.note(f"{count - kept} of {count} layers are computed again in backward; the activations of the others fit")
    return kept


def _how(scorer: Scorer, world: World, training: bool, checkpointing: bool = False) -> How:
    return How(training, checkpointing, world.device.type, sharded=scorer.shards > 1)


def _budget(scorer: Scorer, table: PairTable, optimizer: str | None, how: How, world: World, tracker: Tracker) -> int:
    most = by_kind(MOST if how.training else SLOTS, world.device)

    def find() -> tuple[int, int, float, Need]:
        need = need_of(scorer.outline, _passes_of(scorer, table, how, world.device), optimizer)
        free = free_bytes(world.device, world.local_size)
        return need.slots(free), need.power(RESERVE * free, most), free, need

    # a model in shards may have to run to be measured
    found = world.together(find, meets=bool(scorer.lockstep))
    most_slots, _, free, need = min(found, key=lambda each: each[:3])
    advice = TO_TRAIN if how.training else TO_SCORE
    longest = need.passes.slots
    if most_slots < longest:
        takes = gigabytes(need.passes.bytes(longest))
        raise FullMemory(
            f"the longest pair, {longest:,} token slots, does not fit in memory: it needs {takes}, beside {parts_of(need)}; "
            f"{gigabytes(free)} are free beside the weights. Try {advice}"
        )
    slots: int = min(each for _, each, *_ in found)
    tracker.note(
        f"{slots:,} token slots a {'micro-batch' if how.training else 'batch'} take {gigabytes(need.passes.bytes(slots))}, beside "
        f"{parts_of(need)}; {gigabytes(free)} are free"
    )
    return slots


def counted(scorer: Scorer, table: PairTable, how: How) -> Pass:
    """The memory of passes over pairs as long as the table's longest. Raises what a family's own code may raise: anything."""
    one, two = _one_and_two(scorer, table, int(scorer.layout.costs(table.lengths).argmax()))
    key = _sizes_of(scorer.outline, one, how)
    if key not in COUNTED:
        COUNTED[key] = counted_pass(scorer.outline, one, two, how)
    return COUNTED[key]


def _passes_of(scorer: Scorer, table: PairTable, how: How, device: torch.device) -> Pass:
    """As `counted`; where it cannot be counted, from passes that run."""
    costs = scorer.layout.costs(table.lengths)
    try:
        return counted(scorer, table, how)
    # the code may read the values of tensors
    except Exception as error:
        log.debug("memory is measured, because it cannot be counted: %s", one_line(error, 300))
    with fits(f"the shortest pair, {int(costs.min()):,} token slots,", TO_TRAIN if how.training else TO_SCORE):
        one, two = (each.to(device) for each in _one_and_two(scorer, table, int(costs.argmin())))
        return run_pass(scorer, one, two, how).longer(int(costs.max()))


def _sizes_of(scorer: Scorer, batch: Batch, how: How) -> tuple[object, ...]:
    """All that the count of a pass depends on."""
    weights = tuple((name, each.shape, each.dtype, each.requires_grad) for name, each in scorer.named_parameters())
    batched = tuple(map(_size_of, vars(batch).values()))
    return (
        type(scorer.model), str(scorer.model.config), weights, scorer.dtype, scorer.layout_name, scorer.windows,
        scorer.own_positions, is_fused(scorer, how.kind), scorer.shards, how, batched,
    )  # fmt: skip


def _size_of(value: object) -> object:
    """The shape of a tensor, those of a part of a batch, or a plain value."""
    if isinstance(value, Movable):
        return tuple(map(_size_of, vars(value).values()))
    return value.shape if isinstance(value, torch.Tensor) else value


def _one_and_two(scorer: Scorer, table: PairTable, index: int) -> tuple[Batch, Batch]:
    """A batch of this pair, and one of it twice."""
    one, two = (scorer.layout.make(table, np.full(pairs, index)) for pairs in (1, 2))
    return one, two


def free_bytes(device: torch.device, processes: int = 1) -> float:
    """Free bytes on the device; on a CPU, the equal share of one of `processes`."""
    if device.type not in ("cpu", "mps"):
        return free_memory(device)
    machine = free_bytes_here() / processes
    # a Mac's GPU computes in the memory of the machine
    return min(machine, free_memory(device)) if device.type == "mps" else machine
