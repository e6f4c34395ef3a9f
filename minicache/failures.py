"""What the system refuses, as one line: the error behind that of a library, a failure while writing, one that nothing foresaw."""

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from minicache.drafts import without_drafts
from minicache.errors import MinicacheError, OutputError
from minicache.text import one_line

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What the system may say of any file at any moment, as of one on a disk that fails or was taken away.
NAMES = "ENOENT EACCES EPERM EROFS EIO EMFILE ENFILE ESTALE ENODEV ENXIO ETIMEDOUT ENOTCONN EHOSTDOWN ELOOP"
REFUSED = tuple(getattr(errno, name) for name in NAMES.split() if hasattr(errno, name))
# A number of the system in the text of a library: "No space left on device (os error 28)", "[errno 28] …".
NUMBER = re.compile(r"\b(?:os error|errno) (\d+)", re.IGNORECASE)
LITTLE = 2**16  # bytes that are left on a full disk


@contextmanager
def writing(path: object) -> Iterator[None]:
    """Turn a failure of the disk into one line that names the place."""
    try:
        yield
    except OSError as error:
        path = without_drafts(str(path))
        if error.errno in FULL:
            raise OutputError(f"{path}: the disk is full; free some space and run the same command again") from error
        # which file or folder in it is gone
        gone = (
            f" ({without_drafts(os.fsdecode(error.filename))})"
            if isinstance(error, FileNotFoundError) and error.filename
            else ""
        )
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}{gone}") from error


def of_the_machine(error: OSError) -> OutputError | None:
    """The line for an error of the system that no code at its place has turned into one; None for what may be a bug."""
    if error.errno == errno.ENOENT and not _has_working_directory():
        return OutputError("the working directory was removed; change to another one, and run the same command again")
    if error.errno in FULL:
        return OutputError(
            f"{error.filename or 'a file'}: the disk is full; free some space and run the same command again"
        )
    if error.errno in REFUSED and error.filename is not None:
        return OutputError(f"{os.fsdecode(error.filename)}: {error.strerror}")
    return None


@contextmanager
def panics_as_errors() -> Iterator[None]:
    """Turn a panic of a library that is written in Rust, which no `except Exception` catches, into a RuntimeError."""
    try:
        yield
    except BaseException as error:
        # each such library has a class of its own, under a name that cannot be imported
        if type(error).__name__ != "PanicException":
            raise
        raise RuntimeError(str(error)) from error


@contextmanager
def told_by(tell: Callable[[str], MinicacheError]) -> Iterator[None]:
    """Turn whatever a library raises, panics too, into the error that `tell` makes of its line. This program's own pass."""
    try:
        with panics_as_errors():
            yield
    except MinicacheError:
        raise
    except Exception as error:
        raise tell(one_line(error, 300)) from error


def _has_working_directory() -> bool:
    try:
        Path.cwd()
    except OSError:
        return False
    return True


def system_error(error: BaseException, place: Path) -> OSError:
    """The system's error behind that of a library which failed to write: torch, safetensors and tokenizers pass on a text at most.

    place: an existing file or folder on the disk that was written to, by which a full one is known where nothing names it.
    """
    behind: BaseException | None = error
    while behind is not None:
        if isinstance(behind, OSError) and behind.errno:
            return behind
        if found := NUMBER.search(str(behind)):
            number = int(found[1])
            return OSError(number, os.strerror(number))
        behind = behind.__cause__ or behind.__context__
    if shutil.disk_usage(place).free < LITTLE:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return OSError(" ".join(str(error).split())[-300:])
