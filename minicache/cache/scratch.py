"""Room for decoded pairs in a file instead of in memory, mapped by all processes of a machine.

What of it is in memory is the system's page cache: as much as there is room for, one copy for all. It has a name only until
everyone has mapped it: then it goes with the last process that uses it, however that ends. So nothing stays behind, and no
later run can take it for its own.
"""

import errno
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from minicache.errors import OutputError


def usual_directory() -> Path:
    """Not /tmp, which on many machines is memory itself."""
    return Path(os.environ.get("TMPDIR") or "/var/tmp")


class ScratchFile:
    """A file of so many bytes, for the one process that fills it. `buffer` writes to it."""

    def __init__(self, file: Path, size: int) -> None:
        """Make it, without taking any room yet.

        Raises:
            OutputError: that cannot be.
        """
        self.file, self.size = file, size
        with _in_place(file, size):
            self._descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with _in_place(file, size):
                os.truncate(self._descriptor, size)
                self.buffer = mmap.mmap(self._descriptor, size)
        except BaseException:
            self.close()
            raise

    def reserve(self) -> None:
        """Take the room, as a full disk found while writing to `buffer` would end the process without a word.

        Raises:
            OutputError: the disk has not so much.
        """
        with _in_place(self.file, self.size):
            disk = os.fstatvfs(self._descriptor)
            if disk.f_bavail * disk.f_frsize < self.size:  # to find out by taking all there is would be felt by others
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._descriptor, 0, self.size)

    def unname(self) -> None:
        self.file.unlink(missing_ok=True)

    def close(self) -> None:
        """End this process's use of it. `buffer` stays as long as arrays use it."""
        self.unname()
        os.close(self._descriptor)


def map_scratch(file: Path, size: int) -> mmap.mmap:
    """The bytes of a scratch file that some process of this machine has made, to read.

    Raises:
        OutputError: it is not there.
    """
    with _in_place(file, size):
        descriptor = os.open(file, os.O_RDONLY)
    try:
        return mmap.mmap(descriptor, size, access=mmap.ACCESS_READ)
    finally:
        os.close(descriptor)


@contextmanager
def _in_place(file: Path, size: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        problem = "it has no room" if full else (error.strerror or error)
        raise OutputError(
            f"{file.parent}: cannot hold {size / 1e6:,.1f} MB of decoded pairs: {problem}; name a directory with room, on a disk "
            "that all processes of the machine see, with --scratch"
        ) from error
