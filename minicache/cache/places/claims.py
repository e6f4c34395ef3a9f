"""Claims: the right to write into a cache. In a directory they are file locks, which end with the process that holds them."""

import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from filelock import has_fcntl, lock_descriptor

from minicache.failures import writing

log = logging.getLogger(__name__)

# A file and not the directory itself: NFS locks only files.
CLAIM_FILE = "claim"
# A link in a cache from somebody else would make a file wherever it leads to.
NO_LINK = getattr(os, "O_NOFOLLOW", 0)
# Times to open a lock file that holders remove at their end.
ATTEMPTS = 5
# Beginning of the claim files of shards, one for each job at work.
SHARD_CLAIMS = "shard-"


class Claim(Protocol):
    """A claim and this process's hold on it.

    is_safe: False if the file system has no locks, or no shared ones, so that the claim excludes nobody.
    is_alive: whether the holder that kept this process from taking the claim is known to be alive.
    """

    @property
    def is_safe(self) -> bool: ...

    @property
    def is_alive(self) -> bool: ...

    def take(self, alone: bool) -> bool:
        """Try once to hold the claim, alone or shared; returns whether it is held. Also changes a hold from one to the other."""

    def release(self) -> None: ...

    def remove(self) -> None:
        """Release the claim and delete its file."""


class FileClaim:
    """A lock file and this process's hold on it. The holder of a lock is alive."""

    is_alive = True

    def __init__(self, file: Path) -> None:
        self.file, self.is_safe = file, has_fcntl
        self._descriptor: int | None = None
        self._logged: tuple[bool, bool] | None = None

    def take(self, alone: bool) -> bool:
        """As `Claim.take`. A hold that cannot be changed is lost. On a file system without locks every call succeeds.

        Raises:
            OutputError: the lock file cannot be opened.
        """
        is_held = self._try_to_take(alone)
        # A process that waits asks every second: only changes are logged.
        if self._logged != (logged := (alone, is_held)):
            log.debug("%s, %s: %s", self.file, "alone" if alone else "shared", "held" if is_held else "refused")
            self._logged = logged
        return is_held

    def _try_to_take(self, alone: bool) -> bool:
        for _ in range(ATTEMPTS):
            if not self._try_to_lock(alone):
                return False
            if self._is_of_the_file_there():
                return True
            # its last holder removed the file, and perhaps another process has made it anew
            self.release()
        return False

    def _try_to_lock(self, alone: bool) -> bool:
        if self._descriptor is None:
            # The directory is missing if another process has removed a new cache because its data was bad.
            with writing(self.file), suppress(FileNotFoundError):
                self._descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT | NO_LINK, 0o666)
            if self._descriptor is None:
                return False
        try:
            is_held = lock_descriptor(self._descriptor, blocking=False) if alone else _share(self._descriptor)
        except OSError:
            self.is_safe, is_held = False, True
        if not is_held:
            self.release()
        return is_held

    def _is_of_the_file_there(self) -> bool:
        """Whether the open file is still the one at this path: a lock on a replaced file excludes nobody."""
        assert self._descriptor is not None
        try:
            return os.path.samestat(os.fstat(self._descriptor), self.file.stat())
        except FileNotFoundError:
            return False

    def release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def remove(self) -> None:
        try:
            # Before the release: once it is unlocked, another process may hold the file.
            self.file.unlink(missing_ok=True)
        except PermissionError:
            # Windows cannot remove an open file, nor one that another process has opened meanwhile.
            self.release()
            with suppress(OSError):
                self.file.unlink()
        self.release()


def _share(descriptor: int) -> bool:
    """Take a shared lock; returns False if another process holds it alone. Raises OSError: there are no shared locks.

    filelock has no shared lock of a file: its ReadWriteLock is an SQLite database, its SoftReadWriteLock outlives a killed holder.
    """
    if not has_fcntl:
        raise OSError("Windows has no lock of a file that several processes share")
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
