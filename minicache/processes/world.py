"""The processes of a run: who am I, what device do I have, sums over all. One process is a world of size 1."""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from minicache.errors import ConfigError

# Rank 0 reads and encodes the data while the others wait for it, for hours if need be.
PATIENCE = timedelta(days=2)


@dataclass(frozen=True)
class World:
    """This process among `size` processes."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def any(self, value: bool) -> bool:
        """Whether it is true of any process."""
        return bool(self.sum(torch.tensor(float(value), device=self.device)).item()) if self.size > 1 else value

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def join_world() -> World:
    """Join the process group that torchrun's environment describes, if there is one.

    Raises:
        ConfigError: torchrun was told to restart, and its processes could not find each other afterwards.
    """
    size, local_rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    rank = int(os.environ.get("RANK", 0))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if size > 1:
        store = _fresh_store(size)
        place: dict[str, Any] = {"store": store, "rank": rank, "world_size": size} if store else {}
        # gloo beside NCCL: for what processes tell each other from the CPU's memory
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, timeout=PATIENCE, device_id=device if cuda else None, **place)
    return World(rank, size, device)


def _fresh_store(size: int) -> dist.Store | None:
    """Where restarted processes do not find the addresses of those before them, as they do in torchrun's own store.

    Source: github.com/pytorch/pytorch/issues/135712. torchrun's count of restarts is the same for all on one node only.
    """
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not shared or os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") == "0":
        return None
    if int(os.environ.get("LOCAL_WORLD_SIZE", size)) != size:
        raise ConfigError(
            "torchrun --max-restarts on several nodes: restarted processes would find the addresses of the dead ones in torchrun's "
            "store; export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on every node before torchrun"
        )
    server = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), size, is_master=False)
    return dist.PrefixStore(f"restart-{os.environ['TORCHELASTIC_RESTART_COUNT']}", server)


def leave_world() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
