"""Who may write into a cache. In a directory: file locks, which end with the process that holds them, however it ends."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from filelock import has_fcntl, lock_descriptor

from minicache.disk import writing
from minicache.errors import OutputError

CLAIM_FILE = "claim"  # a file and not the directory: NFS locks nothing else
SHARD_CLAIMS = "shard-"  # files that begin so, one a job of an array at work


class Claim(Protocol):
    """A claim and this process's hold on it.

    is_safe: False where it cannot keep apart those who share it: there are no locks, or none that can be shared.
    is_alive: whether the holder that kept us from taking it is known to be at work still.
    """

    @property
    def is_safe(self) -> bool: ...

    @property
    def is_alive(self) -> bool: ...

    def take(self, alone: bool) -> bool:
        """Try once to hold it, alone or together with others, and return whether it is held. A hold can be changed so too."""

    def release(self) -> None: ...

    def remove(self) -> None:
        """Release it and leave no file behind."""


class FileClaim:
    """A lock file and this process's hold on it. The holder of a lock is alive."""

    is_alive = True

    def __init__(self, file: Path) -> None:
        self.file, self.is_safe = file, has_fcntl
        self._descriptor: int | None = None

    def take(self, alone: bool) -> bool:
        """As `Claim.take`. A hold that cannot be changed is lost. Where the file system has no locks, every call succeeds.

        Raises:
            OutputError: the lock file cannot be opened.
        """
        if self._descriptor is None:
            # The directory is missing where another process removed a new cache whose data was refused.
            with writing(self.file), suppress(FileNotFoundError):
                self._descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT, 0o666)
            if self._descriptor is None:
                return False
        try:
            is_held = lock_descriptor(self._descriptor, blocking=False) if alone else _share(self._descriptor)
        except OSError:
            self.is_safe, is_held = False, True
        if is_held and self._is_of_the_file_there():
            return True
        self.release()
        return False

    def _is_of_the_file_there(self) -> bool:
        """Whether the open file is still the one at this path: locks on a file that was replaced exclude nobody."""
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
            # Before the release: a file that is unlocked may already be another process's.
            self.file.unlink(missing_ok=True)
        except PermissionError:
            # Windows removes no open file, and none that another process has opened by now.
            self.release()
            with suppress(OSError):
                self.file.unlink()
        self.release()


@contextmanager
def held(file: Path) -> Iterator[None]:
    """Hold a lock file alone within the block; it is removed at the end.

    Raises:
        OutputError: another process holds it, or it cannot be written.
    """
    claim = FileClaim(file)
    if not claim.take(alone=True):
        raise OutputError(f"{file.parent}: another process is writing there; wait for its end")
    try:
        yield
    finally:
        claim.remove()


def _share(descriptor: int) -> bool:
    """Take the lock together with others; False if another process holds it alone. Raises OSError: no such locks here.

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
