"""Files that a user named as an output: whole or not at all, and known to be writable before the work that fills them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from minicache.errors import OutputError


def check_writable(file: Path) -> None:
    """Make the directories above `file`. Better known before an hour of work than after it.

    Raises:
        OutputError: it cannot be a file there.
    """
    with _one_line(file):
        if file.is_dir():
            raise OutputError(f"{file}: is a directory; expected the name of a file to write")
        file.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(file.parent, os.W_OK):
            raise OutputError(f"{file}: its directory cannot be written to; name another file")


@contextmanager
def written_whole(file: Path) -> Iterator[Path]:
    """A draft beside `file` to write to; it takes `file`'s place when the block ends well, and is gone when it does not.

    Raises:
        OutputError: the disk refuses.
    """
    check_writable(file)
    draft = file.with_name(f".{file.name[:200]}.{os.getpid()}.draft")
    try:
        with _one_line(file):
            yield draft
            draft.replace(file)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def _one_line(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"{file}: cannot be written: {error.strerror or error}") from error
