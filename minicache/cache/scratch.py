"""A file for decoded pairs instead of memory, mapped by all processes of a machine.

The system's page cache holds as much of it in memory as there is room for, in one copy for all processes. The file has a name only
until every process has mapped it; then the system frees it when the last of these processes ends, also if it is killed. So no
file stays behind that a later run could take for its own. Windows keeps the name of an open file: there the system removes it when
all of these processes have closed it.
"""

import errno
import mmap
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from minicache.errors import OutputError
from minicache.failures import FULL

# On Windows: remove the file with its last handle, a mapping's included.
TEMPORARY = getattr(os, "O_TEMPORARY", 0)


class ScratchFile:
    """A file of a given size for the one process that fills it, through `buffer`."""

    def __init__(self, file: Path, size: int) -> None:
        """Make the file, without allocating its bytes.

        Raises:
            OutputError: it cannot be made.
        """
        self.file, self.size = file, size
        with _in_place(file, size):
            self._descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL | TEMPORARY, 0o600)
        try:
            with _in_place(file, size):
                os.truncate(self._descriptor, size)
                self.buffer = mmap.mmap(self._descriptor, size)
        except BaseException:
            self.close()
            raise

    def reserve(self) -> None:
        """Allocate the bytes now: a disk that gets full while `buffer` is written ends the process without a message.

        Raises:
            OutputError: the disk has less room.
        """
        with _in_place(self.file, self.size):
            # Allocating until it fails would leave other programs without any room for a while.
            if shutil.disk_usage(self.file.parent).free < self.size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._descriptor, 0, self.size)

    def unname(self) -> None:
        """Remove the file's name; processes that have mapped the file go on using it."""
        # Windows does not remove the name of an open file.
        with suppress(PermissionError):
            self.file.unlink(missing_ok=True)

    def close(self) -> None:
        """End this process's use of the file. `buffer` stays as long as arrays use it."""
        os.close(self._descriptor)
        self.unname()


def map_scratch(file: Path, size: int) -> mmap.mmap:
    """The bytes of a scratch file that another process of this machine has made, for reading.

    Raises:
        OutputError: there is no such file.
    """
    with _in_place(file, size):
        descriptor = os.open(file, os.O_RDONLY | TEMPORARY)
    try:
        return mmap.mmap(descriptor, size, access=mmap.ACCESS_READ)
    finally:
        os.close(descriptor)


@contextmanager
def _in_place(file: Path, size: int) -> Iterator[None]:
    """Turn an OSError into an OutputError that names --scratch."""
    try:
        yield
    except OSError as error:
        problem = "it has no room" if error.errno in FULL else (error.strerror or error)
        raise OutputError(
            f"{file.parent}: cannot hold {size / 1e6:,.1f} MB of decoded pairs: {problem}; name a directory with room, on a disk "
            "that all processes of the machine see, with --scratch"
        ) from error
