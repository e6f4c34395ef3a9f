"""The names of what is under way: a draft lies beside its place, and a killed call's is removed by the next.

A draft is called `.{name}.{machine}-{pid}-{token}-{token}.draft`. One rule says which drafts are leftovers of a killed call: those
of a process of this machine that is gone, and all others that nothing has touched for a day.
"""

import os
import re
import shutil
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from glob import escape
from pathlib import Path

import psutil

DRAFT = re.compile(r"\.(?P<machine>[0-9a-f]{8})-(?P<pid>\d+)-(?P<process>[0-9a-f]{8})-[0-9a-f]{8}\.draft$")
# A folder or file that is under way, by this rule and by that of caches (cache/places).
UNDER_WAY = re.compile(
    r"(?P<before>^|[/\\])\.(?P<name>[^/\\]+)\.(?:[0-9a-f]{8}-\d+-[0-9a-f]{8}-[0-9a-f]{8}\.draft|[a-z]+ing-[0-9a-f]{8})(?![^/\\])"
)
LONGEST_NAME = 180  # bytes of a name that its draft repeats; file systems allow 255 in all
MOST_PID = 2**31 - 1  # of any system; the name of a file may hold any number
OLD_AFTER = 24 * 3600  # seconds; no file or folder takes so long to write
OF_MACHINE = f"pid:[{0xEFFFFFFC}]"  # PROC_PID_INIT_INO of Linux, include/linux/proc_ns.h


@contextmanager
def draft_beside(place: Path) -> Iterator[Path]:
    """A new draft's name, removed at the end if it is still there; leftovers of killed calls are removed first."""
    remove_leftovers(place.parent, place.name)
    draft = draft_of(place)
    try:
        yield draft
    finally:
        _remove(draft)


def draft_of(place: Path) -> Path:
    """A name beside `place` that nothing else uses, not even another attempt of this process."""
    return place.with_name(
        f".{_shortened(place.name)}.{_machine()}-{os.getpid()}-{_process()}-{os.urandom(4).hex()}.draft"
    )


def drafts(folder: Path, name: str) -> list[Path]:
    """The drafts of what is called `name` in a folder, and their own drafts, under way or left over; also of earlier versions."""
    known = escape(_shortened(name))
    return [*folder.glob(f".{known}.*.draft"), *folder.glob(f"..{known}.*.draft")]


def remove_leftovers(folder: Path, name: str) -> None:
    """Remove the drafts of `name` whose calls were killed."""
    for draft in drafts(folder, name):
        if _is_left_over(draft):
            _remove(draft)


def without_drafts(path: str) -> str:
    """The path by which a user knows a place in a draft, or in the draft of a draft."""
    while (known := UNDER_WAY.sub(r"\g<before>\g<name>", path)) != path:
        path = known
    return path


def _is_left_over(draft: Path) -> bool:
    found = DRAFT.search(draft.name)
    if found and found["machine"] == _machine():
        pid = int(found["pid"])
        # a container's processes have the same few numbers in each of its lives
        return found["process"] != _process() if pid == os.getpid() else pid > MOST_PID or not psutil.pid_exists(pid)
    with suppress(OSError):
        return time.time() - draft.lstat().st_mtime > OLD_AFTER
    return False


def _remove(draft: Path) -> None:
    if draft.is_dir() and not draft.is_symlink():
        shutil.rmtree(draft, ignore_errors=True)
        return
    with suppress(OSError):
        draft.unlink(missing_ok=True)


def _shortened(name: str) -> str:
    return name.encode("utf-8", "ignore")[:LONGEST_NAME].decode("utf-8", "ignore")


@cache
def _machine() -> str:
    """A digest of what numbers the processes: the machine, or a container of it, which may share the machine's name."""
    import socket

    name = socket.gethostname()
    with suppress(OSError):
        # of Linux; the number of the machine's own never changes
        if (space := os.readlink("/proc/self/ns/pid")) != OF_MACHINE:  # noqa: PTH115
            name += space
    return f"{zlib.crc32(name.encode()):08x}"


@cache
def _process() -> str:
    """Tells this process from an earlier one of the same number. A forked child has another number."""
    return os.urandom(4).hex()
