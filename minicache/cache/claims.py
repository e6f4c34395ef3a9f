"""Who may write into a cache: file locks, which end with the process that holds them, however that ends."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from minicache.disk import writing
from minicache.errors import OutputError

CLAIM_FILE = "claim"  # a file and not the directory: NFS locks nothing else
SHARD_CLAIMS = "shard-"  # files that begin so, one a job of an array at work


class Claim:
    """A lock file and this process's hold on it: alone, or together with all who want it together.

    is_safe: False once the file system turned out to have no locks; then every claim succeeds.
    """

    def __init__(self, file: Path) -> None:
        self.file, self.is_safe = file, True
        self._descriptor: int | None = None

    def take(self, alone: bool) -> bool:
        """Whether it is ours now, at once. One held already is changed, and lost where that does not succeed.

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
        """Release it and leave no file behind."""
        self.file.unlink(missing_ok=True)
        self.release()


@contextmanager
def claimed(path: Path) -> Iterator[None]:
    """Hold off other runs from the cache at `path`; for one process of a run.

    Raises:
        OutputError: another run writes into this cache.
    """
    claim = Claim(path / CLAIM_FILE)
    try:
        if not claim.take(alone=True):
            raise OutputError(f"{path}: another precompute-ref is writing into this cache; wait for its end")
        yield
    finally:
        claim.release()
