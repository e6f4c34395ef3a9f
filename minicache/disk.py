"""Writing to disk: one line for whatever fails, and making sure that what is written is there after a power loss."""

import errno
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minicache.errors import OutputError


@contextmanager
def writing(path: object) -> Iterator[None]:
    """Turn a failure of the disk into one line that names the place."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(f"{path}: the disk is full; free some space and run the same command again") from error
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error


def with_folders(files: list[Path]) -> list[Path]:
    return [*files, *{file.parent for file in files}]


def flush_to_disk(places: Iterable[Path]) -> None:
    """A file renamed into place but never flushed may be empty after a power loss; its folder not flushed, and it is not there."""
    for place in places:
        descriptor = os.open(place, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def check_writable(file: Path) -> None:
    """Make the directories above `file`. Better known before an hour of work than after it.

    Raises:
        OutputError: it cannot be a file there.
    """
    with writing(file):
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
        with writing(file):
            yield draft
            draft.replace(file)
    finally:
        draft.unlink(missing_ok=True)


def read_json(file: Path) -> dict[str, Any]:
    """What a file says that this program wrote; nothing where there is none. Raises OutputError: it cannot be read."""
    try:
        facts = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise OutputError(f"{file}: cannot be read: {error}") from error
    if not isinstance(facts, dict):
        raise OutputError(f"{file}: expected a JSON object, got {str(facts)[:40]!r}")
    return facts


def write_json(file: Path, facts: dict[str, Any]) -> None:
    """Whole or not at all; paths as text. Raises OutputError: the disk is full or cannot be written; what was there stays."""
    with written_whole(file) as draft:
        draft.write_text(json.dumps(facts, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
