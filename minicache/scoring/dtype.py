"""The precision of a run's passes."""

from collections.abc import Callable

import torch

from minicache.errors import ConfigError
from minicache.processes.devices import has_bfloat16
from minicache.processes.world import World


def agreed_dtype(dtype: str, world: World, note: Callable[[str], None], sharded: bool = False) -> str:
    """As `resolve_dtype`, of this rank's device; all ranks must call this, and must have the same."""
    name = "--dtype"
    found: str = world.agree(lambda: {name: resolve_dtype(dtype, world.device, note, sharded)})[name]
    return found


def resolve_dtype(dtype: str, device: torch.device, note: Callable[[str], None], sharded: bool = False) -> str:
    """The precision that `dtype` names; 'auto' is bfloat16 on GPUs, and float32 on a CPU and on mps.

    On GPUs without bfloat16, 'auto' is float16, or float32 for a model in shards, which float16 does not go with; the note says so.

    Raises:
        ConfigError: bfloat16 is asked for, and the device does not have it.
    """
    if dtype == "auto" and device.type in ("cpu", "mps"):
        return "float32"
    if dtype not in ("auto", "bfloat16") or has_bfloat16(device):
        return "bfloat16" if dtype == "auto" else dtype
    if dtype == "bfloat16":
        raise ConfigError("--dtype bfloat16: this device does not support it; choose float16 or float32")
    dtype = "float32" if sharded else "float16"
    note(f"--dtype auto is {dtype} here: {device} has no bfloat16")
    return dtype
