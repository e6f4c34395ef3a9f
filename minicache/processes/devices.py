"""The devices that torch computes on: which one a process takes, and what each kind has and lacks.

cuda (NVIDIA, and AMD by ROCm), xpu (Intel), mps (Apple), npu (Ascend, by the package torch_npu), cpu. Code that depends on the kind
of device asks here.
"""

import importlib.util
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch.utils._triton import has_triton

from minicache.errors import ConfigError

CPU = torch.device("cpu")
NAMES = re.compile(r"auto|cpu|(?P<kind>cuda|mps|xpu|npu)(?::(?P<index>\d{1,3}))?")
# Kind of device -> torch's collectives on tensors there. On mps there are none.
BACKENDS = {"cuda": "nccl", "xpu": "xccl", "npu": "hccl"}
# Kinds of devices that compute in float64; mps and many of xpu do not, and npu hardly. Those that FlexAttention is compiled for.
FLOAT64, FLEX = {"cpu", "cuda"}, {"cuda", "xpu"}
# torchrun and --nproc set these. Their processes see the same devices; those of a batch system may each see one of their own.
SAME_DEVICES = ("TORCHELASTIC_RUN_ID", "MINIDPO_NPROC")
Size = TypeVar("Size")


class Facts(NamedTuple):
    """A device's name, its memory in bytes, and a GPU's compute capability."""

    name: str
    memory: int
    capability: str | None = None


def choose(asked: str, local_rank: int = 0, processes: int = 1) -> torch.device:
    """The device of a process, made torch's current one.

    asked: auto, cuda, mps, xpu, npu or cpu; a kind with an index, such as cuda:1, for a single process. auto is the accelerator
    that torch reports, or the CPU. local_rank: number of this process on its machine. processes: of the whole run.

    Raises:
        ConfigError: there is no such device, or not enough of them.
    """
    named = NAMES.fullmatch(asked)
    if not named:
        raise ConfigError(f"--device: expected auto, cuda, mps, xpu, npu or cpu (or cuda:1, by number), got {asked!r}")
    _load_npu(asked)
    found = torch.accelerator.current_accelerator(check_available=True)
    kind = found.type if found else "cpu"
    if asked == "cpu" or (asked == "auto" and kind == "cpu"):
        return CPU
    if named["kind"] not in (None, kind):
        raise ConfigError(f"--device {asked}: torch sees no {named['kind']} here; expected one of: {_seen(kind)}")
    if kind == "mps" and processes > 1:
        raise ConfigError(
            "several processes on mps: torch has no collectives there; expected one process, or --device cpu"
        )
    if named["index"] and processes > 1:
        raise ConfigError(f"--device {asked}: is one device, and {processes} processes need one each; expected {kind}")
    device = torch.device(kind, int(named["index"] or _own(local_rank, kind)))
    if device.index >= torch.accelerator.device_count():
        raise ConfigError(f"--device {asked}: there is no such device here; expected one of: {_seen(kind)}")
    if kind != "mps":
        torch.accelerator.set_device_index(device)
    return device


def _own(local_rank: int, kind: str) -> int:
    """The index of this process's device. Raises ConfigError: there are fewer devices than processes."""
    count = torch.accelerator.device_count()
    if count == 1 and not any(name in os.environ for name in SAME_DEVICES):
        # A batch system has shown each of its processes a device of its own, which is number 0 to all of them.
        return 0
    if local_rank >= count:
        raise ConfigError(
            f"process {local_rank + 1} on this machine, and torch sees {_seen(kind)}; expected a device for each process: at most "
            f"{count} of them, or --device cpu"
        )
    return local_rank


def _load_npu(asked: str) -> None:
    """Make torch know npu devices. Raises ConfigError: they are asked for, and the package is missing."""
    if asked.startswith("npu"):
        if importlib.util.find_spec("torch_npu") is None:
            raise ConfigError(
                f"--device {asked}: needs Ascend's package; pip install torch_npu, of this torch's version"
            )
        importlib.import_module("torch_npu")


def _seen(kind: str) -> str:
    count = torch.accelerator.device_count() if kind != "cpu" else 0
    return ", ".join(["cpu", *(f"{kind}:{index}" for index in range(count))])


def backends(device: torch.device) -> str:
    """The backends of torch.distributed for tensors on the device and on the CPU.

    Raises:
        ConfigError: this build of torch has none for the device, as on Windows.
    """
    if device.type == "cpu":
        return "gloo"
    name = BACKENDS.get(device.type)
    if name is None or not dist.is_backend_available(name):
        raise ConfigError(
            f"several processes on {device.type}: this torch has no {(name or 'collectives').upper()} (on Windows it never has); "
            "expected one process, or --device cpu"
        )
    # gloo beside it, for collectives on tensors in the CPU's memory
    return f"cpu:gloo,{device.type}:{name}"


def by_kind(sizes: Mapping[str, Size], device: torch.device) -> Size:
    """The entry of a table with "cpu" and "cuda" for a kind of device; mps computes no faster than fits the CPU's entry."""
    return sizes[device.type if device.type in sizes else "cuda" if device.type in BACKENDS else "cpu"]


_meant: list[str] = []


@contextmanager
def as_if_on(kind: str) -> Iterator[None]:
    """Within this tensors without content, on the CPU, stand for those on a device of this kind."""
    _meant.append(kind)
    try:
        yield
    finally:
        _meant.pop()


def kind_of(tensor: torch.Tensor) -> str:
    """The kind of device that a tensor is on, or stands for."""
    return _meant[-1] if _meant else tensor.device.type


# --- what a kind of device has ---


def has_float64(device: torch.device) -> bool:
    """Whether the device computes in float64."""
    return device.type in FLOAT64


def widest(device: torch.device) -> torch.dtype:
    """The precision of sums on the device."""
    return torch.float64 if has_float64(device) else torch.float32


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device computes in bfloat16 itself."""
    if device.type == "cpu":
        return True
    if device.type == "mps":
        return torch.backends.mps.is_macos_or_newer(14, 0)
    module: Any = torch.get_device_module(device)
    options = {} if device.type == "npu" else {"including_emulation": False}
    return bool(module.is_bf16_supported(**options))


@cache
def has_flex(device: torch.device) -> bool:
    """Whether FlexAttention is compiled for the device."""
    return device.type in FLEX and has_triton()


@cache
def has_flash() -> bool:
    """Whether torch's FlashAttention runs on CUDA here, or, where there is none to ask, on cards of today: from Ampere on."""
    return not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] >= 8


def attention_kernels(device: torch.device, half: bool = False) -> tuple[str, ...]:
    """What may compute attention over packed rows there, the best first: see scoring/kernels.py. half: in half precision."""
    varlen = ("varlen",) if half and device.type == "cuda" else ()
    return (*varlen, "flex" if has_flex(device) else "spans")


def pins(device: torch.device) -> bool:
    """Whether copies from page-locked memory to the device are asynchronous."""
    return device.type in BACKENDS


# --- its memory, name and random state ---


def free_memory(device: torch.device) -> float:
    """Bytes that tensors on an accelerator may still take, what torch holds in reserve included."""
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    free, _ = torch.accelerator.get_memory_info(device)
    return free + torch.accelerator.memory_reserved(device) - torch.accelerator.memory_allocated(device)


def most_memory(device: torch.device) -> int:
    """The most bytes of tensors on an accelerator so far; on mps, what the driver holds, which torch gives back only when asked."""
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    return torch.accelerator.max_memory_allocated(device)


def empty_cache(device: torch.device) -> None:
    """Give the memory that torch holds in reserve back to the device."""
    if device.type == "mps":
        torch.mps.empty_cache()
    elif device.type != "cpu":
        torch.accelerator.empty_cache()


def forget_most_memory(device: torch.device) -> None:
    """Begin `most_memory` again; on mps `empty_cache` does."""
    if device.type not in ("cpu", "mps"):
        torch.accelerator.reset_peak_memory_stats(device)


def facts_of(device: torch.device) -> Facts:
    """The facts of an accelerator."""
    if device.type == "mps":
        return Facts("Apple GPU", torch.mps.recommended_max_memory())
    module: Any = torch.get_device_module(device)
    found = module.get_device_properties(device)
    capability = f"{found.major}.{found.minor}" if device.type == "cuda" else None
    return Facts(found.name, found.total_memory, capability)


def accelerators() -> list[torch.device]:
    """All accelerators of this machine that torch sees."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return [torch.device(found.type, index) for index in range(torch.accelerator.device_count())] if found else []


def keeping_random_state(device: torch.device) -> AbstractContextManager[Any]:
    """A context at whose end the random states of the CPU and of the device are as before."""
    return torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type)
