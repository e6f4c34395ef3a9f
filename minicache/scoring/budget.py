"""The token slots of one forward and backward pass, from the free memory and the memory that a slot of the model needs."""

import os
from pathlib import Path

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from minicache.options.catalog import OPTIMIZERS
from minicache.pairs import PairTable
from minicache.scoring.head import CHUNK_NUMBERS
from minicache.scoring.scorer import Scorer

# More slots make no step faster, because the device is busy already.
MOST = {"cpu": 8192, "cuda": 65536}
# Share of the free memory to use; the rest is for fragmentation and for what the estimate misses.
RESERVE = 0.85


def training_budget(
    scorer: Scorer, table: PairTable, optimizer: str, checkpointing: bool, device: torch.device, processes: int
) -> int:
    """Token slots of a micro-batch: a power of two, so that small differences in free memory change nothing.

    Runs the model on the table's shortest pairs. optimizer: a name in OPTIMIZERS. checkpointing: whether layers will be computed
    again in backward; this must not be in effect yet. processes: number of processes that share the CPU's memory.
    """
    most = MOST.get(device.type, MOST["cpu"])
    trained = sum(_here(parameter).numel() for parameter in scorer.parameters() if parameter.requires_grad)
    # bytes per parameter; DDP keeps a second set of gradients to send
    gradients = 8 if processes > 1 else 4
    vocabulary, width = scorer.model.get_input_embeddings().weight.shape
    head = 3 * 4 * CHUNK_NUMBERS.get(device.type, 0) + 4 * vocabulary * width
    free = RESERVE * free_bytes(device, processes) - trained * (gradients + OPTIMIZERS[optimizer].state_bytes) - head
    need = slot_bytes(scorer, table, checkpointing, device)
    return min(most, 1 << max(0, int(np.log2(max(1.0, free / need)))))


def slot_bytes(scorer: Scorer, table: PairTable, checkpointing: bool, device: torch.device) -> float:
    """Bytes per token slot that forward keeps for backward and that backward needs beside them."""
    order = np.argsort(table.lengths.sum(1), kind="stable")
    (first, slots), (second, more) = (_saved(scorer, table, order[:pairs], device) for pairs in (1, 2))
    saved = (second - first) / max(1, more - slots) if more > slots else first / slots
    config = scorer.model.config.get_text_config()
    if not checkpointing:
        return 1.25 * saved
    layers, width = int(config.num_hidden_layers), int(config.hidden_size)
    return layers * width * 4 + 2 * saved / layers


def _saved(scorer: Scorer, table: PairTable, indices: np.ndarray, device: torch.device) -> tuple[int, int]:
    """Bytes kept for backward, without the weights, and token slots, of one forward pass over these pairs."""
    weights = {_here(parameter).untyped_storage().data_ptr() for parameter in scorer.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    batch = scorer.layout.make(table, indices).to(device)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        scores = scorer(batch, distribution=True)
    del scores
    return sum(kept.values()), batch.input_ids.numel()


def _here(parameter: torch.Tensor) -> torch.Tensor:
    """The parameter, or this rank's shard of it."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


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
