"""Writing files and folders whole: to a draft beside their place, flushed, renamed."""

import atexit
import errno
import json
import os
import shutil
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import gettempdir
from typing import Any

from minicache.drafts import draft_beside, draft_of
from minicache.errors import MinicacheError, OutputError
from minicache.failures import writing
from minicache.json_lines import to_json

WINDOWS = os.name == "nt"
# Seconds to wait: on Windows another program, such as a virus scanner, may hold a new file for a moment.
PAUSES = (0.05, 0.1, 0.2, 0.4)
# Bytes of a file that is read whole, and of a journal of lines.
MOST_WHOLE, MOST_JOURNAL = 2**28, 2**30
MEANWHILE = "{place}: another process has made it meanwhile; name another or remove it"
NOT_TO_BE_FLUSHED = (errno.EACCES, errno.EINVAL)  # folders on Windows, those without a right to read, some file systems


def usual_directory() -> Path:
    """The default directory of scratch files: not /tmp, which is memory on many machines."""
    if WINDOWS:
        return Path(gettempdir())
    return Path(os.environ.get("TMPDIR") or "/var/tmp")


def with_folders(files: list[Path]) -> list[Path]:
    return [*files, *{file.parent for file in files}]


def flush_to_disk(places: Iterable[Path]) -> None:
    """Flush files and folders. After a power loss a renamed file that was not flushed may be empty, and is missing if its folder
    was not flushed."""
    for place in places:
        try:
            descriptor = os.open(place, os.O_RDWR if WINDOWS and place.is_file() else os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            if error.errno not in NOT_TO_BE_FLUSHED or not place.is_dir():
                raise


def move(source: Path, target: Path) -> None:
    """Rename a file or folder, in place of a file that lies there. Raises OSError: it cannot be renamed, still after a second."""
    for pause in PAUSES:
        try:
            source.replace(target)
            return
        except PermissionError:
            time.sleep(pause)
    source.replace(target)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it that are missing, each flushed into the one above it."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    flush_to_disk(place.parent for place in missing)


def check_writable(file: Path) -> None:
    """Make the folders above `file`. An hour of work should not end with finding out that they cannot be made.

    Raises:
        OutputError: it cannot be a file there.
    """
    with writing(file):
        if file.is_dir():
            raise OutputError(f"{file}: is a directory; expected the name of a file to write")
        make_folder(file.parent)
        if not os.access(file.parent, os.W_OK):
            raise OutputError(f"{file}: its directory cannot be written to; name another file")


@contextmanager
def written_whole(file: Path, is_new: bool = False) -> Iterator[Path]:
    """A draft's name beside `file`, to write to. It is flushed and takes the file's place when the block ends well, else removed.

    is_new: the caller found nothing there.

    Raises:
        OutputError: the disk refuses; or, with `is_new`, another process has made the file meanwhile.
    """
    check_writable(file)
    with writing(file), draft_beside(file) as draft:
        yield draft
        flush_to_disk([draft])
        if is_new and os.path.lexists(file):
            raise OutputError(MEANWHILE.format(place=file))
        move(draft, file)
        flush_to_disk([file.parent])


@contextmanager
def folder_written_whole(folder: Path) -> Iterator[Path]:
    """An empty draft of a folder beside its place. It is flushed and renamed when the block ends well, else removed.

    Raises:
        OutputError: something lies at `folder` already, or the disk refuses.
    """
    with writing(folder):
        if os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir())):
            raise OutputError(f"{folder}: exists already; name another or remove it")
        make_folder(folder.parent)
        with draft_beside(folder) as draft:
            draft.mkdir()
            yield draft
            publish_folder(draft, folder)


def publish_folder(draft: Path, folder: Path) -> None:
    """Flush a finished draft and rename it to `folder`, where nothing or an empty folder lies.

    Raises:
        OutputError: something lies there. OSError: the disk refuses; then the draft is not at `folder`.
    """
    inside = list(draft.rglob("*"))
    _share(inside, draft.stat().st_mode)
    flush_to_disk([*inside, draft])
    if WINDOWS and folder.is_dir():
        # Elsewhere an empty folder is replaced.
        folder.rmdir()
    try:
        move(draft, folder)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise OutputError(MEANWHILE.format(place=folder)) from error
        raise
    try:
        flush_to_disk([folder.parent])
    except OSError:
        move(folder, draft)
        raise


def replace_folder(draft: Path, folder: Path) -> None:
    """As `publish_folder`, in place of what lies there. Only between two renames there is neither. Raises as it does."""
    if not folder.exists():
        publish_folder(draft, folder)
        return
    flush_to_disk([*draft.rglob("*"), draft])
    old = draft_of(folder)
    move(folder, old)
    try:
        publish_folder(draft, folder)
    except BaseException:
        move(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _share(files: Iterable[Path], mode: int) -> None:
    """Let all read and write files who may do so in their folder of this mode: safetensors makes them for their owner alone."""
    for file in files:
        if file.is_file() and (shared := file.stat().st_mode | mode & 0o666) != file.stat().st_mode:
            file.chmod(shared)


def remove_folder(folder: Path) -> None:
    """Remove a folder, if it is there. It is renamed first: neither a reader nor a kill finds half of it under its name.

    Raises:
        OSError: it cannot be renamed.
    """
    dead = draft_of(folder)
    with suppress(FileNotFoundError):
        move(folder, dead)
    shutil.rmtree(dead, ignore_errors=True)


@contextmanager
def scratch_folder(what: str) -> Iterator[Path]:
    """A new folder for temporary files, which no other user can read; removed when the block ends.

    what: its purpose, for its name; those that killed calls with the same purpose left are removed first.

    Raises:
        OutputError: no directory for temporary files can be written to.
    """
    place = temporary_directory()
    with draft_beside(place / f"minidpo-{what}") as folder:
        with writing(place):
            folder.mkdir(mode=0o700)
        yield folder


def kept_scratch_folder(what: str) -> Path:
    """As `scratch_folder`, removed when the process ends."""
    stack = ExitStack()
    folder = stack.enter_context(scratch_folder(what))
    atexit.register(stack.close)
    return folder


def temporary_directory() -> Path:
    """The directory of temporary files. Raises OutputError: there is none that can be written to."""
    try:
        return Path(gettempdir())
    except FileNotFoundError as error:
        raise OutputError(
            "no directory for temporary files can be written to, or none has room; name one in the variable TMPDIR"
        ) from error


class Journal:
    """A file of lines that one process appends to, each at once."""

    def __init__(self, file: Path) -> None:
        """Open it. Raises OutputError: it cannot be written."""
        self.file = file
        with writing(file):
            # unbuffered: what a full disk refused is not written once more when the file is closed
            self._stream = file.open("ab", buffering=0)
        self._is_whole = True

    def add(self, line: str) -> None:
        """Append a line, which ends with a line break. Raises OutputError: the disk is full or refuses; a part may be there."""
        left, self._is_whole = line.encode(), False
        with writing(self.file):
            while left:
                left = left[self._stream.write(left) :]
        self._is_whole = True

    def close(self, flush: bool = False) -> None:
        """Close the file. flush: first, so that its lines survive a power loss. Raises OutputError: the disk refuses that."""
        try:
            # a disk that refused a line was named then
            if flush and self._is_whole:
                with writing(self.file):
                    os.fsync(self._stream.fileno())
        finally:
            self._stream.close()


def require_file(file: Path) -> None:
    """Raises OSError: there is nothing, or a pipe or device, which may never end and on which even opening may wait for ever."""
    if not stat.S_ISREG(file.stat().st_mode):
        raise OSError(errno.EINVAL, "expected a file, got something else", str(file))


def read_whole(file: Path, most: int = MOST_WHOLE) -> bytes:
    """The content of a file that is parsed in memory.

    Raises:
        OSError: there is none, or a pipe or a device, or it has more than `most` bytes: a sparse one of terabytes takes no disk.
    """
    require_file(file)
    if (size := file.stat().st_size) > most:
        raise OSError(errno.EFBIG, f"has {size:,} bytes, expected {most:,} at most", str(file))
    return file.read_bytes()


def read_json(file: Path, problem: type[MinicacheError] = OutputError) -> dict[str, Any]:
    """What a file of one JSON object says; nothing where there is none. Raises `problem`: it cannot be read."""
    try:
        facts = json.loads(read_whole(file).decode()) if file.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise problem(f"{file}: cannot be read: {error}") from error
    if not isinstance(facts, dict):
        raise problem(f"{file}: expected a JSON object, got {str(facts)[:40]!r}")
    return facts


def write_json(file: Path, facts: dict[str, Any]) -> None:
    """Write a JSON object, paths as text. Raises OutputError: the disk is full or refuses; what was there stays."""
    with written_whole(file) as draft:
        draft.write_text(to_json(facts, indent=2, default=str) + "\n", encoding="utf-8", newline="\n")
