"""Who may write into a cache. In a directory: file locks, which end with the process that holds them, however that ends."""

import fcntl
import os
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from minicache.disk import writing

CLAIM_FILE = "claim"  # a file and not the directory: NFS locks nothing else
SHARD_CLAIMS = "shard-"  # files that begin so, one a job of an array at work


class Claim(Protocol):
    """A claim and this process's hold on it.

    is_safe: False once it turned out that there are no locks; then every claim succeeds.
    is_alive: whether the one who kept us from taking it is known to be at work still.
    """

    @property
    def is_safe(self) -> bool: ...

    @property
    def is_alive(self) -> bool: ...

    def take(self, alone: bool) -> bool:
        """Whether it is ours now, at once: alone, or together with all who want it together. One held already is changed."""

    def release(self) -> None: ...

    def remove(self) -> None:
        """Release it and leave no file behind."""


class FileClaim:
    """A lock file and this process's hold on it. A lock that is held is held by a process that is alive."""

    is_alive = True

    def __init__(self, file: Path) -> None:
        self.file, self.is_safe = file, True
        self._descriptor: int | None = None

    def take(self, alone: bool) -> bool:
        """Held already, it is lost where the change does not succeed.

        Raises:
            OutputError: the lock file cannot be opened.
        """
        if self._descriptor is None:
            with writing(self.file), suppress(FileNotFoundError):  # a new cache whose data was refused is taken away
                self._descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT, 0o666)
            if self._descriptor is None:
                return False
        try:
            fcntl.flock(self._descriptor, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            return False
        except OSError:
            self.is_safe = False
        if not self._is_of_the_file_there():
            self.release()
            return False
        return True

    def _is_of_the_file_there(self) -> bool:
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
        self.file.unlink(missing_ok=True)
        self.release()
