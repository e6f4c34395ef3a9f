"""The cores and the free memory of this machine that this process may use, as its system reports them."""

import os
from pathlib import Path


def cores() -> int:
    """Cores that this process may use: a batch job, a container or taskset may give it some of the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_bytes_here() -> float:
    """Free bytes of the machine's memory that this process may use."""
    # not at the top: errors.py, which all commands import, is above this module
    import psutil

    return min(float(psutil.virtual_memory().available), job_bytes())


def job_bytes(groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float:
    """Bytes that this process's control groups (of a container or batch job) still allow. Infinite without a limit.

    The kernel can reclaim cached pages of files, which count as free. Source: docs.kernel.org/admin-guide/cgroup-v2.html, memory.
    """
    try:
        (path,) = (line[3:] for line in own.read_text(encoding="utf-8").splitlines() if line.startswith("0::"))
    except (OSError, ValueError):
        return float("inf")
    place, room = groups / path.lstrip("/"), float("inf")
    for group in (place, *place.parents):
        try:
            limit, used = (int((group / f"memory.{name}").read_text(encoding="utf-8")) for name in ("max", "current"))
            held = dict(line.split() for line in (group / "memory.stat").read_text(encoding="utf-8").splitlines())
            room = min(room, limit - used + int(held["inactive_file"]) + int(held["active_file"]))
        # this group has no limit
        except (OSError, ValueError, KeyError):
            continue
    return max(0.0, room)
