"""The command line as it runs elsewhere: `python -m tests.helpers.elsewhere COMMANDS.json [windows]` runs commands in one process.

COMMANDS.json: lists of arguments. Each command's exit code is written to stderr, behind "exit code". With `windows`, what that
system lacks is taken away, and files that are open resist as they do there. Locks stay those of this system: filelock has its own
there.
"""

import errno
import json
import os
import shutil
import signal
import stat
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

LACKED = (
    "fork",
    "setsid",
    "killpg",
    "getuid",
    "geteuid",
    "sysconf",
    "posix_fallocate",
    "sched_getaffinity",
    "mkfifo",
    "nice",
)
SIGNALS = ("SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "alarm", "setitimer", "pthread_sigmask")
tries: Counter[str] = Counter()


def become_windows() -> None:
    """Take away what Windows lacks. Libraries are imported first: what they do on Windows is theirs."""
    import filelock
    import psutil
    import torch
    import transformers
    import zarr

    assert all((psutil, torch, transformers, zarr))
    filelock.has_fcntl = False  # type: ignore[misc]
    modules: dict[str, Any] = sys.modules
    modules.update({"fcntl": None, "resource": None, "pwd": None, "grp": None})
    for module, names in ((os, LACKED), (signal, SIGNALS)):
        for name in names:
            delattr(module, name)
    shutil._use_fd_functions = False  # type: ignore[attr-defined]
    for name, wrapped in (("open", _open), ("fsync", _fsync), ("replace", _rename), ("rename", _rename)):
        setattr(os, name, wrapped(getattr(os, name)))
    os.unlink = os.remove = _unlink(os.unlink)
    from minicache import disk

    disk.WINDOWS, disk.PAUSES = True, (0.001, 0.001)  # type: ignore[assignment]


def _refused(path: object) -> PermissionError:
    return PermissionError(errno.EACCES, "Access is denied", str(path))


def _open(real: Callable[..., int]) -> Callable[..., int]:
    def opened(path: Any, flags: int, *more: Any, **named: Any) -> int:
        if Path(path).is_dir():
            raise _refused(path)
        return real(path, flags, *more, **named)

    return opened


def _fsync(real: Callable[[int], None]) -> Callable[[int], None]:
    def flushed(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise _refused(descriptor)
        real(descriptor)

    return flushed


def _rename(real: Callable[..., None]) -> Callable[..., None]:
    """A virus scanner holds each new file twice; folders are not replaced, and nothing that is open is renamed."""

    def renamed(source: Any, target: Any) -> None:
        tries[str(target)] += 1
        if tries[str(target)] % 3 or Path(target).is_dir() or _is_open(source) or _is_open(target):
            raise _refused(target)
        real(source, target)

    return renamed


def _unlink(real: Callable[..., None]) -> Callable[..., None]:
    def unlinked(path: Any, **named: Any) -> None:
        if not named and _is_open(path):
            raise _refused(path)
        real(path, **named)

    return unlinked


def _is_open(path: Any) -> bool:
    """Whether this process has the file, or one in the folder, open or mapped."""
    place = os.path.realpath(path)
    held = set()
    for number in os.listdir("/proc/self/fd"):  # noqa: PTH208
        # one that another thread closes meanwhile
        with suppress(FileNotFoundError):
            held.add(os.path.realpath(f"/proc/self/fd/{number}"))
    with open("/proc/self/maps", encoding="utf-8") as maps:  # noqa: PTH123
        held |= {line.split(maxsplit=5)[-1].strip() for line in maps}
    return any(each == place or each.startswith(f"{place}/") for each in held)


def run(arguments: list[str]) -> object:
    """The exit code of a command."""
    from minicache.cli import main

    sys.argv = ["minidpo", *arguments]
    try:
        main()
    except SystemExit as end:
        return end.code or 0
    return 0


if __name__ == "__main__":
    if "windows" in sys.argv[2:]:
        become_windows()
    for command in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        print(f"exit code {run(command)}: {command[0]}", file=sys.stderr, flush=True)
    if tries:
        assert min(tries.values()) >= 3, "each rename succeeds after two failures"
