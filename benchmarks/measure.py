"""Measuring time, in turns within one process, and the memory of a process."""

import ctypes
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("minicache", "torch", "transformers", "trl", "datasets", "zarr", "numpy")


def alternate(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each run in each round. The order rotates, so that no run always follows the same one."""
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(rounds):
        for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
            started = time.perf_counter()
            runs[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def ratio(times: list[float], others: list[float]) -> float:
    """Median over the rounds of times / others, in which a slowdown of a whole round cancels."""
    return statistics.median(a / b for a, b in zip(times, others, strict=True))


def peak_gb(run: Callable[[], object]) -> float:
    """Peak GB of the process (on a GPU: of PyTorch) during a run, above what it held before."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 1e9
    # memory that was freed but is still held would hide as much of the run's own
    ctypes.CDLL(None).malloc_trim(0)
    # reset the peak
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    run()
    return (_resident("VmHWM") - before) / 1e9


def _resident(field: str) -> int:
    """VmRSS or VmHWM of this process, bytes. Linux only."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def command_line(name: str) -> str:
    """The command that runs this benchmark as it was run, to be typed in a shell."""
    return shlex.join(["python", "-m", f"benchmarks.{name}", *sys.argv[1:]])


def machine() -> dict[str, Any]:
    """The machine, its load, and the versions of the packages."""
    names = [line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version("minidpo" if name == "minicache" else name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "cpu": f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        # of the last minute; above 0.5 the machine was not idle
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": versions,
        "date": datetime.now(UTC).date().isoformat(),
    }


def _cpuinfo() -> list[str]:
    file = Path("/proc/cpuinfo")
    return file.read_text().splitlines() if file.exists() else []
