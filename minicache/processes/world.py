"""The processes of a run: rank, size, device, and collectives over them. A single process is a world of size 1."""

import logging
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from minicache.errors import ConfigError
from minicache.processes import devices
from minicache.processes.products import compute_in_float32

log = logging.getLogger(__name__)

# Timeout of the collectives: rank 0 reads and encodes the data, possibly for hours, while the others wait.
PATIENCE = timedelta(days=2)


@dataclass(frozen=True)
class World:
    """This process among `size` processes."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """`values`, any shape, summed over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def any(self, value: bool) -> bool:
        """Whether `value` is true in any process."""
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
        """Wait until all processes are here."""
        if self.size > 1:
            dist.barrier()


def join_world(device: str = "auto") -> World:
    """The world of this process: the process group that torchrun's environment describes, joined, or a single process.

    device: as `devices.choose`.

    Raises:
        ConfigError: there is no such device; torchrun may restart the processes, which then could not find each other.
    """
    size, local_rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    rank = int(os.environ.get("RANK", 0))
    mine, backend = devices.choose(device, local_rank, size), "none"
    compute_in_float32()
    if size > 1:
        backend = devices.backends(mine)
        store = _fresh_store(size)
        place: dict[str, Any] = {"store": store, "rank": rank, "world_size": size} if store else {}
        bound = None if mine.type == "cpu" else mine
        dist.init_process_group(backend, timeout=PATIENCE, device_id=bound, **place)
    log.debug("rank %d of %d on %s, backend %s", rank, size, mine, backend)
    return World(rank, size, mine)


def _fresh_store(size: int) -> PrefixStore | None:
    """A store without the addresses of the processes before a restart, which torchrun's own store keeps; None if not needed.

    torchrun counts restarts per node, so the count is the same for all processes on a single node only.

    Raises:
        ConfigError: restarts are on, and the processes run on several nodes.

    Source: github.com/pytorch/pytorch/issues/135712.
    """
    # torch does not declare that it exports TCPStore
    c10d: Any = dist
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not shared or os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") == "0":
        return None
    if int(os.environ.get("LOCAL_WORLD_SIZE", size)) != size:
        raise ConfigError(
            "torchrun --max-restarts on several nodes: restarted processes would find the addresses of the dead ones in torchrun's "
            "store; export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on every node before torchrun"
        )
    server = c10d.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), size, is_master=False)
    return PrefixStore(f"restart-{os.environ['TORCHELASTIC_RESTART_COUNT']}", server)


def leave_world() -> None:
    """Leave the process group, if this process joined one."""
    if dist.is_initialized():
        dist.destroy_process_group()
