"""Writing files and folders whole: beside their place, flushed, renamed. A failure of the disk becomes one line.

What is under way has a name of its own, `.{name}.{machine}-{pid}-{token}-{token}.draft`. One rule says which drafts are leftovers
of a killed call: those of a process of this machine that is gone, and all others that nothing has touched for a day.
"""

import atexit
import errno
import json
import os
import re
import shutil
import stat
import time
import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from glob import escape
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import psutil

from minicache.errors import OutputError
from minicache.json_lines import to_json

DRAFT = re.compile(r"\.(?P<machine>[0-9a-f]{8})-(?P<pid>\d+)-(?P<process>[0-9a-f]{8})-[0-9a-f]{8}\.draft$")
# A folder or file that is under way, by this rule and by that of caches (cache/places).
UNDER_WAY = re.compile(
    r"(?P<before>^|[/\\])\.(?P<name>[^/\\]+)\.(?:[0-9a-f]{8}-\d+-[0-9a-f]{8}-[0-9a-f]{8}\.draft|[a-z]+ing-[0-9a-f]{8})(?![^/\\])"
)
LONGEST_NAME = 180  # bytes of a name that its draft repeats; file systems allow 255 in all
MOST_PID = 2**31 - 1  # of any system; the name of a file may hold any number
OLD_AFTER = 24 * 3600  # seconds; no file or folder takes so long to write
WINDOWS = os.name == "nt"
# Seconds to wait: on Windows another program, such as a virus scanner, may hold a new file for a moment.
PAUSES = (0.05, 0.1, 0.2, 0.4)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What the system may say of any file at any moment, as of one on a disk that fails or was taken away.
NAMES = "ENOENT EACCES EPERM EROFS EIO EMFILE ENFILE ESTALE ENODEV ENXIO ETIMEDOUT ENOTCONN EHOSTDOWN ELOOP"
REFUSED = tuple(getattr(errno, name) for name in NAMES.split() if hasattr(errno, name))
# A number of the system in the text of a library: "No space left on device (os error 28)", "[errno 28] …".
NUMBER = re.compile(r"\b(?:os error|errno) (\d+)", re.IGNORECASE)
MEANWHILE = "{place}: another process has made it meanwhile; name another or remove it"
OF_MACHINE = f"pid:[{0xEFFFFFFC}]"  # PROC_PID_INIT_INO of Linux, include/linux/proc_ns.h
LITTLE = 2**16  # bytes that are left on a full disk
NOT_TO_BE_FLUSHED = (errno.EACCES, errno.EINVAL)  # folders on Windows, those without a right to read, some file systems


def usual_directory() -> Path:
    """The default directory of scratch files: not /tmp, which is memory on many machines."""
    if WINDOWS:
        return Path(gettempdir())
    return Path(os.environ.get("TMPDIR") or "/var/tmp")


@contextmanager
def writing(path: object) -> Iterator[None]:
    """Turn a failure of the disk into one line that names the place."""
    try:
        yield
    except OSError as error:
        path = _without_drafts(str(path))
        if error.errno in FULL:
            raise OutputError(f"{path}: the disk is full; free some space and run the same command again") from error
        # which file or folder in it is gone
        gone = (
            f" ({_without_drafts(os.fsdecode(error.filename))})"
            if isinstance(error, FileNotFoundError) and error.filename
            else ""
        )
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}{gone}") from error


def _without_drafts(path: str) -> str:
    """The path by which a user knows a place in a draft, or in the draft of a draft."""
    while (known := UNDER_WAY.sub(r"\g<before>\g<name>", path)) != path:
        path = known
    return path


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
            try:
                publish_folder(draft, folder)
            except OSError as error:
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise OutputError(MEANWHILE.format(place=folder)) from error
                raise


def publish_folder(draft: Path, folder: Path) -> None:
    """Flush a finished draft and rename it to `folder`, where nothing or an empty folder lies.

    Raises:
        OSError: the disk refuses; then it is not at `folder`.
    """
    flush_to_disk([*draft.rglob("*"), draft])
    if WINDOWS and folder.is_dir():
        # Elsewhere an empty folder is replaced.
        folder.rmdir()
    move(draft, folder)
    try:
        flush_to_disk([folder.parent])
    except OSError:
        move(folder, draft)
        raise


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


@contextmanager
def draft_beside(place: Path) -> Iterator[Path]:
    """A new draft's name, removed at the end if it is still there; leftovers of killed calls are removed first."""
    remove_leftovers(place.parent, place.name)
    draft = draft_of(place)
    try:
        yield draft
    finally:
        _remove(draft)


def draft_of(place: Path) -> Path:
    """A name beside `place` that nothing else uses, not even another attempt of this process."""
    return place.with_name(
        f".{_shortened(place.name)}.{_machine()}-{os.getpid()}-{_process()}-{os.urandom(4).hex()}.draft"
    )


def drafts(folder: Path, name: str) -> list[Path]:
    """The drafts of what is called `name` in a folder, under way or left over, also those of earlier versions."""
    return list(folder.glob(f".{escape(_shortened(name))}.*.draft"))


def remove_leftovers(folder: Path, name: str) -> None:
    """Remove the drafts of `name` whose calls were killed."""
    for draft in drafts(folder, name):
        if _is_left_over(draft):
            _remove(draft)


def _is_left_over(draft: Path) -> bool:
    found = DRAFT.search(draft.name)
    if found and found["machine"] == _machine():
        pid = int(found["pid"])
        # a container's processes have the same few numbers in each of its lives
        return found["process"] != _process() if pid == os.getpid() else pid > MOST_PID or not psutil.pid_exists(pid)
    with suppress(OSError):
        return time.time() - draft.lstat().st_mtime > OLD_AFTER
    return False


def _remove(draft: Path) -> None:
    if draft.is_dir() and not draft.is_symlink():
        shutil.rmtree(draft, ignore_errors=True)
        return
    with suppress(OSError):
        draft.unlink(missing_ok=True)


def _shortened(name: str) -> str:
    return name.encode("utf-8", "ignore")[:LONGEST_NAME].decode("utf-8", "ignore")


@cache
def _machine() -> str:
    """A digest of what numbers the processes: the machine, or a container of it, which may share the machine's name."""
    import socket

    name = socket.gethostname()
    with suppress(OSError):
        # of Linux; the number of the machine's own never changes
        if (space := os.readlink("/proc/self/ns/pid")) != OF_MACHINE:  # noqa: PTH115
            name += space
    return f"{zlib.crc32(name.encode()):08x}"


@cache
def _process() -> str:
    """Tells this process from an earlier one of the same number. A forked child has another number."""
    return os.urandom(4).hex()


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


def read_json(file: Path) -> dict[str, Any]:
    """What a file of this program's says; nothing where there is none. Raises OutputError: it cannot be read."""
    try:
        facts = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise OutputError(f"{file}: cannot be read: {error}") from error
    if not isinstance(facts, dict):
        raise OutputError(f"{file}: expected a JSON object, got {str(facts)[:40]!r}")
    return facts


def write_json(file: Path, facts: dict[str, Any]) -> None:
    """Write a JSON object, paths as text. Raises OutputError: the disk is full or refuses; what was there stays."""
    with written_whole(file) as draft:
        draft.write_text(to_json(facts, indent=2, default=str) + "\n", encoding="utf-8", newline="\n")
