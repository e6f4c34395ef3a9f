"""The processes of a run: rank, size, device, and collectives over them. A single process is a world of size 1."""

import logging
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from functools import reduce
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from minicache.errors import ConfigError, MinicacheError, ProcessLost, is_lost_peer, said_by_network
from minicache.processes import devices
from minicache.processes.launch import LISTENING
from minicache.processes.outcome import outcome_of, portable, raise_agreed
from minicache.processes.products import compute_in_float32
from minicache.processes.stuck import Watch

log = logging.getLogger(__name__)

# Timeout of what all ranks do in every step, such as the sum of gradients.
STEP = timedelta(minutes=10)
# Timeout of waits for the work of one rank: rank 0 reads and encodes the data, or writes a model, possibly for hours.
PATIENCE = timedelta(days=2)

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among `size` processes.

    patient: the group, over gloo, of what may wait for hours; None for a single process. watch: ends this process where it was
    asked to stop and the others do not come.
    """

    rank: int
    size: int
    device: torch.device
    patient: Any = field(default=None, compare=False, repr=False)
    watch: Watch = field(default_factory=Watch, compare=False, repr=False)

    def __deepcopy__(self, memo: object) -> "World":
        return self

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    @property
    def local_size(self) -> int:
        """The number of processes on this machine, which share its memory."""
        return _number("LOCAL_WORLD_SIZE", self.size, least=1)

    # --- decisions ---

    def together(self, work: Callable[[], T], meets: bool = False) -> list[T]:
        """The results of `work` on all ranks, in their order. All ranks must call this.

        meets: the ranks meet in `work` itself, in which one that fails ends by itself: the others wait for it there, not here.

        Raises:
            MinicacheError: `work` raised it on some rank; it is raised on all, and names the rank if not all have the same.
            ProcessLost: `work` raised something else on another rank.
        """
        if self.size == 1 or meets:
            return self.gather(work())
        value, error = outcome_of(work)
        outcomes = self.gather((value, portable(error)))
        self._require([failed for _, failed in outcomes], error)
        return [value for value, _ in outcomes]

    def each(self, work: Callable[[], T]) -> T:
        """This rank's result of `work`, which may be anything. As `together` else."""
        if self.size == 1:
            return work()
        value, error = outcome_of(work)
        self._require(self.gather(portable(error)), error)
        return value  # type: ignore[return-value]

    def _require(self, failed: list[MinicacheError | None], own: Exception | None) -> None:
        """Raise the error of the first rank that has one, if any has. own: what this rank raised."""
        found = [(rank, each) for rank, each in enumerate(failed) if each is not None]
        if found:
            rank, first = found[0]
            if len({str(each) for _, each in found}) > 1 or len(found) < self.size:
                first.args = (f"{self.name(rank)}: {first}",)
            raise_agreed(own, first)

    def first(self, work: Callable[[], T]) -> T:
        """Rank 0's result of `work`, which only rank 0 runs, on every rank; or the MinicacheError that it raised."""
        if self.size == 1:
            return work()
        value, error = outcome_of(work) if self.is_main else (None, None)
        agreed: tuple[T, MinicacheError | None] = self.broadcast((value, portable(error)))
        if agreed[1] is not None:
            raise_agreed(error, agreed[1])
        return agreed[0]

    def agree(self, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of `work`, values by name, which must be the same on all ranks.

        Raises:
            ConfigError: one is not; the line names the odd ranks. MinicacheError: see `together`.
        """
        found = self.together(work)
        for name in found[0]:
            values = [str(each.get(name)) for each in found]
            usual = Counter(values).most_common(1)[0][0]
            if odd := [rank for rank, each in enumerate(values) if each != usual]:
                also = f" (odd too: {', '.join(map(str, odd[1:]))})" if odd[1:] else ""
                raise ConfigError(
                    f"{name}: {self.name(odd[0])} has {values[odd[0]]}{also}, process {values.index(usual)} has {usual}; expected "
                    "the same for all processes of a run: the same options, and the same files on every machine"
                )
        return found[0]

    def name(self, rank: int) -> str:
        """A rank, in words."""
        return f"process {rank} of {self.size}"

    # --- collectives ---

    def sum(self, values: torch.Tensor, patient: bool = False) -> torch.Tensor:
        """A few `values`, any shape, summed over all processes, in place; bit for bit the same on all of them.

        They are added in the order of the ranks: what ranks decide from the sum, they decide alike.

        patient: the ranks may come hours apart. This waits for the device.
        """
        if self.size == 1:
            return values
        mine = values.cpu() if patient else values.contiguous()
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        with self.watch.inside():
            dist.all_gather(parts, mine, group=self.patient if patient else None)
        return values.copy_(reduce(torch.add, parts))

    def any(self, value: bool) -> bool:
        """Whether `value` is true in any process."""
        return bool(self.sum(torch.tensor([float(value)], device=self.device)).item()) if self.size > 1 else value

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank, however long it takes to come."""
        if self.size == 1:
            return value
        box = [value]
        with self.watch.inside():
            dist.broadcast_object_list(box, src=0, group=self.patient)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank, however long they take to come."""
        values = [value] * self.size
        if self.size > 1:
            with self.watch.inside():
                dist.all_gather_object(values, value, group=self.patient)
        return values

    def barrier(self) -> None:
        """Wait until all processes are here, however long that takes."""
        if self.size > 1:
            with self.watch.inside():
                dist.barrier(group=self.patient)


def join_world(device: str = "auto") -> World:
    """The world of this process: the process group that torchrun's environment describes, joined, or a single process.

    device: as `devices.choose`.

    Raises:
        ConfigError: there is no such device; a variable of the launcher is no such number; torchrun may restart the processes, and
            they could not find each other then.
        ProcessLost: the processes do not find each other, or their devices cannot be joined.
    """
    size, rank, local_rank = _number("WORLD_SIZE", 1, least=1), _number("RANK", 0), _number("LOCAL_RANK", 0)
    if rank >= size:
        raise ConfigError(
            f"RANK={rank}: expected one below WORLD_SIZE, which is {size}; unset both for a single process"
        )
    mine, backend = devices.choose(device, local_rank, size), "none"
    compute_in_float32()
    patient, watch = None, Watch()
    if size > 1:
        backend = devices.backends(mine)
        try:
            patient = _join(rank, size, backend, mine)
        except RuntimeError as error:
            if not is_lost_peer(error):
                raise
            raise ProcessLost(
                f"process {rank} of {size}: cannot join the others by {backend}: {said_by_network(error)}; expected all of them "
                "started, MASTER_ADDR and MASTER_PORT open between their machines, and a device for each"
            ) from error
        watch.start(f"process {rank} of {size}")
    log.debug("rank %d of %d on %s, backend %s", rank, size, mine, backend)
    return World(rank, size, mine, patient, watch)


def _join(rank: int, size: int, backend: str, device: torch.device) -> Any:
    """Join the process group; returns the patient one."""
    store = _store(rank, size)
    place: dict[str, Any] = {"store": store, "rank": rank, "world_size": size} if store else {}
    dist.init_process_group(backend, timeout=STEP, device_id=None if device.type == "cpu" else device, **place)
    return patient_group()


def _number(name: str, default: int, least: int = 0) -> int:
    """The number in a variable that torchrun or a batch system sets. Raises ConfigError: it is none, or too small."""
    value = os.environ.get(name)
    if value is None:
        return default
    if not (value.isascii() and value.isdigit() and int(value) >= least):
        raise ConfigError(
            f"{name}={value}: expected a number of at least {least}, as torchrun sets it; unset it for a single process"
        )
    return int(value)


def patient_group() -> Any:
    """A new group of all processes, over gloo, whose collectives wait for hours. All processes must call this."""
    return dist.new_group(backend="gloo", timeout=PATIENCE)


def _store(rank: int, size: int) -> Any:
    """The store in which the processes find each other's addresses; None for that of torch's own choice.

    From `launch`, rank 0 inherits the socket to listen on. From torchrun with restarts the store must be without the addresses of
    the processes before a restart, which torchrun's own store keeps. It counts restarts per node, so the count is the same for all
    processes on a single node only.

    Raises:
        ConfigError: restarts are on, and the processes run on several nodes.

    Source: github.com/pytorch/pytorch/issues/135712.
    """
    # torch does not declare what it exports
    c10d: Any = dist
    listening = os.environ.pop(LISTENING, None)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        if listening is None:
            return None
        own = {"is_master": True, "master_listen_fd": int(listening)} if rank == 0 else {"is_master": False}
        return c10d.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), size, timeout=STEP, **own)
    if os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") == "0":
        return None
    if _number("LOCAL_WORLD_SIZE", size, least=1) != size:
        raise ConfigError(
            "torchrun --max-restarts on several nodes: restarted processes would find the addresses of the dead ones in torchrun's "
            "store; export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on every node before torchrun"
        )
    server = c10d.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), size, is_master=False)
    return c10d.PrefixStore(f"restart-{os.environ['TORCHELASTIC_RESTART_COUNT']}", server)


def leave_world() -> None:
    """Leave the process group, if this process joined one."""
    if dist.is_initialized():
        dist.destroy_process_group()
