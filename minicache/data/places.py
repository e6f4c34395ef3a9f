"""What a value of --data names -> the files with rows: files, folders, globs, pipes, URLs, data sets of the Hub."""

import os
import re
import stat
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from glob import glob, has_magic
from pathlib import Path
from typing import IO

from minicache.data import hub, urls
from minicache.data.files import SUFFIXES, DataFile, suffix_of
from minicache.data.folders import MOST_ABOUT, Folder, Note, is_data
from minicache.disk import usual_directory
from minicache.drafts import draft_beside
from minicache.errors import ConfigError, DataError

STDIN = "-"
# A folder with a configuration of its README and a split.
OF_FOLDER = re.compile(r"(?P<path>.+?)(?::(?P<config>[^:@/\\]+))?(?:@(?P<split>[^@/\\]+))?", re.DOTALL)
KINDS = "a file, a folder, a glob in quotes, a URL, - (standard input) or a data set of the Hub (org/name)"


@contextmanager
def located(data: Iterable[str], note: Note) -> Iterator[list[DataFile]]:
    """The files that the values of --data name, in their order. Copies of what is no local file last as long as the block.

    note: shows a line to a person.

    Raises:
        DataError: a value names nothing, or several splits. StoreError: it cannot be reached. ConfigError: it cannot work.
        OutputError: the disk has no room for a copy.
    """
    with draft_beside(usual_directory() / "minidpo-data") as scratch:
        yield [file for value in _each_once(data) for file in locate(value, scratch, note)]


def locate(value: str, scratch: Path, note: Note) -> list[DataFile]:
    """The files that one value of --data names. scratch: a directory, perhaps to be made, for copies."""
    if not value or "\0" in value:
        raise ConfigError(f"--data {value!a}: expected {KINDS}")
    if value == STDIN:
        return [_of_stdin(scratch)]
    if "://" in value:
        return urls.fetch(value, scratch, note)
    if _exists(path := Path(value)):
        return _at(path, value, scratch, note)
    if (found := OF_FOLDER.fullmatch(value)) and _exists(path := Path(found["path"])) and path.is_dir():
        return _in_folder(path, found["path"], (found["config"] or "", found["split"] or ""), note)
    if has_magic(value) and hub.REVISION not in value:
        return _fitting(value, note)
    if suffix_of(value.partition("@")[0]) not in SUFFIXES and (files := hub.fetch(value, note)) is not None:
        return files
    raise DataError(f"{value}: no such file or directory; expected {KINDS}")


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    # Of a name that is too long.
    except OSError:
        return False


def _each_once(data: Iterable[str]) -> list[str]:
    """The values. Raises ConfigError: standard input is named twice, which can be read once."""
    values = list(data)
    if values.count(STDIN) > 1:
        raise ConfigError("--data -: expected standard input once")
    return values


def _at(path: Path, name: str, scratch: Path, note: Note) -> list[DataFile]:
    """What lies at a path."""
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        return _in_folder(path, name, ("", ""), note)
    if stat.S_ISFIFO(mode):
        with path.open("rb") as pipe:
            return [_copy(pipe, name, scratch)]
    if not stat.S_ISREG(mode):
        raise DataError(f"{name}: is a device or a socket; expected {KINDS}")
    return [DataFile(name, path)]


def _of_stdin(scratch: Path) -> DataFile:
    if sys.stdin is None or sys.stdin.isatty():
        raise DataError("--data -: standard input is a terminal; expected rows from a pipe or a file")
    return _copy(sys.stdin.buffer, STDIN, scratch)


def _copy(pipe: IO[bytes], name: str, scratch: Path) -> DataFile:
    return DataFile(name, urls.copied(iter(lambda: pipe.read(urls.AT_ONCE), b""), name, scratch))


def _in_folder(path: Path, name: str, asked: tuple[str, str], note: Note) -> list[DataFile]:
    """The files of a folder. asked: the configuration and the split, "" for what is not named."""
    shown = name.rstrip("/" + os.sep) or "/"

    def read(inside: str) -> str:
        with (path / inside).open(encoding="utf-8", errors="replace") as stream:
            return stream.read(MOST_ABOUT)

    try:
        chosen = Folder(shown, _files_below(path), read).select(*asked, note)
    except OSError as error:
        raise DataError(f"{shown}: cannot be read: {error.strerror or error}") from error
    return [DataFile(f"{shown.rstrip('/')}/{inside}", path / inside) for inside in chosen]


def _files_below(folder: Path) -> list[str]:
    """All files below a folder; links to folders are followed, to each folder once."""
    found, seen = [], set()
    for place, folders, files in os.walk(folder, followlinks=True, onerror=_fail):
        if (real := os.path.realpath(place)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        found += [
            (Path(place) / name).relative_to(folder).as_posix() for name in files if (Path(place) / name).is_file()
        ]
    return found


def _fail(error: OSError) -> None:
    raise error


def _fitting(pattern: str, note: Note) -> list[DataFile]:
    """The files that fit a glob: those with rows, unless the glob itself says with which suffix they end."""
    # Path.glob has no absolute patterns.
    fits = sorted(name for name in glob(pattern, recursive=True) if Path(name).is_file())  # noqa: PTH207
    chosen = fits if Path(pattern).suffix and not has_magic(Path(pattern).suffix) else list(filter(is_data, fits))
    if not chosen:
        found = f"expected names ending in {', '.join(SUFFIXES)}; got {', '.join(fits[:5])}" if fits else "no file fits"
        raise DataError(f"{pattern}: {found}")
    if len(chosen) < len(fits):
        note(f"{pattern}: not used: {', '.join(name for name in fits if name not in chosen)}")
    return [DataFile(name, Path(name)) for name in chosen]
