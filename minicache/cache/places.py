"""Where a cache lies: a directory, or a place in an object store. What both can do; nobody else asks which of them it is."""

import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import suppress
from glob import escape
from pathlib import Path

from zarr.abc.store import Store

from minicache.cache.bounded import BoundedStore
from minicache.cache.claims import SHARD_CLAIMS, Claim, FileClaim
from minicache.config import Where
from minicache.disk import flush_to_disk, with_folders, writing
from minicache.errors import CacheNotFound, OutputError

ROOT = "zarr.json"  # the file that makes a cache of what lies there: comes last, goes first
POLL_SECONDS = 1.0  # between two looks whether whoever claims a cache is still alive


class Place(ABC):
    """One place, the files in it by names such as `pairs/tokens/c/0/0`.

    where: as a user writes it, for messages and to come back to. home: the name that a draft of the cache is made beside.
    Whatever fails in an object store raises StoreError; on a disk, reading raises OSError and writing OutputError.
    """

    where: Where
    home: Path

    def __str__(self) -> str:
        return str(self.where)

    @abstractmethod
    def locate(self, name: str) -> Where:
        """What a user may call this file."""

    # --- the whole ---

    @abstractmethod
    def require_cache(self) -> None:
        """Raises CacheNotFound: no cache lies here."""

    @abstractmethod
    def require_free(self, is_new: bool = False) -> None:
        """Raises OutputError: something lies here; with `is_new`, an empty directory is something too."""

    @abstractmethod
    def publish(self, draft: Path) -> None:
        """Let the directory `draft` be what lies here: all of it at once, or not at all. Raises OutputError: something does."""

    @abstractmethod
    def remove(self) -> None:
        """Take away all that lies here, so that nobody meets half a cache."""

    @abstractmethod
    def store(self, read_only: bool) -> Store:
        """As zarr reads and writes it."""

    @abstractmethod
    def claim(self, name: str) -> Claim:
        """A claim by this name, which nobody has taken yet."""

    @abstractmethod
    def total_bytes(self) -> int:
        """Of all files that lie here just now."""

    @abstractmethod
    def remove_leftovers(self) -> None:
        """Delete what writers that were killed left half-written. Only while no other process writes."""

    @abstractmethod
    def remove_partial(self, folders: Iterable[str]) -> None:
        """The same in some folders alone. Only while no other process writes there."""

    # --- single files ---

    @abstractmethod
    def has(self, name: str) -> bool: ...

    @abstractmethod
    def size(self, name: str) -> int:
        """Bytes of a file; raises OSError (FileNotFoundError among them) if it cannot be looked at."""

    @abstractmethod
    def read(self, name: str) -> bytes | None:
        """What is in a file; None if there is none."""

    @abstractmethod
    def write(self, name: str, content: bytes) -> None:
        """Make or replace a file, at once."""

    @abstractmethod
    def folder(self, name: str) -> Path:
        """A directory with what lies below this name; may be a copy. There is none if nothing does."""

    @abstractmethod
    def put_folder(self, name: str, content: Path) -> None:
        """Let what lies below this name be what is in the directory `content`."""

    @abstractmethod
    def flush(self, names: Iterable[str], folders: bool = True) -> None:
        """Make sure that these files are there after a power loss; `folders`: also that they are found."""


class Directory(Place):
    """On a disk of this machine or one that it has mounted."""

    def __init__(self, path: Path) -> None:
        self.where = self.path = path

    @property
    def home(self) -> Path:  # type: ignore[override]
        return self.path.resolve()  # what a link leads to

    def locate(self, name: str) -> Path:
        return self.path / name

    def require_cache(self) -> None:
        path = self.path
        try:
            is_directory, is_cache = path.is_dir(), (path / ROOT).is_file()
        except OSError as error:
            raise CacheNotFound(f"{path}: cannot be looked into: {error.strerror}") from error
        if not is_directory:
            if path.exists():
                raise CacheNotFound(f"{path}: is a file, no cache; `minidpo import-cache` reads what `export` wrote")
            raise CacheNotFound(
                f"{path}: no such directory; `minidpo precompute-ref --ref-cache {path} …` makes a cache"
            )
        if not is_cache:
            raise CacheNotFound(
                f"{path}: no reference cache (it has no {ROOT}); name the directory precompute-ref wrote"
            )

    def require_free(self, is_new: bool = False) -> None:
        path = self.path
        if is_new and os.path.lexists(path):
            raise OutputError(f"{path}: exists; expected the name of a cache to make; name another or remove it")
        if path.exists() and (not path.is_dir() or any(path.iterdir()) or path.samefile(Path.cwd())):
            raise OutputError(f"{path}: exists and is no reference cache; name another --ref-cache or remove it")

    def publish(self, draft: Path) -> None:
        with writing(self):
            flush_to_disk(draft.rglob("*"))
            place = self.home
            draft.replace(place)
            try:
                flush_to_disk([place.parent])
            except OSError:  # or it would be there, though this call failed
                place.replace(draft)
                raise

    def remove(self) -> None:
        place = self.home
        dead = draft_of(place)
        try:
            place.replace(dead)
        except OSError:  # its folder cannot be written to
            dead = place
        shutil.rmtree(dead, ignore_errors=True)

    def store(self, read_only: bool) -> Store:
        return BoundedStore(self.path, read_only=read_only)

    def claim(self, name: str) -> Claim:
        return FileClaim(self.path / name)

    def total_bytes(self) -> int:
        total = 0
        for file in self.path.rglob("*"):
            with suppress(OSError):  # one that a running stage one renames or removes meanwhile
                total += file.stat().st_size if file.is_file() else 0
        return total

    def remove_leftovers(self) -> None:
        self._unlink([*self.path.rglob("*.partial"), *self.path.glob(f"{SHARD_CLAIMS}*")])
        remove_drafts(self.home)

    def remove_partial(self, folders: Iterable[str]) -> None:
        self._unlink([leftover for folder in folders for leftover in (self.path / folder).rglob("*.partial")])

    def _unlink(self, files: list[Path]) -> None:
        with writing(self):
            for file in files:
                file.unlink(missing_ok=True)

    def has(self, name: str) -> bool:
        return (self.path / name).is_file()

    def size(self, name: str) -> int:
        return (self.path / name).stat().st_size

    def read(self, name: str) -> bytes | None:
        return (self.path / name).read_bytes() if self.has(name) else None

    def write(self, name: str, content: bytes) -> None:
        file = self.path / name
        with writing(file):
            draft = file.with_suffix(".tmp")
            draft.write_bytes(content)
            flush_to_disk([draft])
            draft.replace(file)

    def folder(self, name: str) -> Path:
        return self.path / name

    def put_folder(self, name: str, content: Path) -> None:
        with writing(self.path / name):
            shutil.rmtree(self.path / name, ignore_errors=True)
            shutil.copytree(content, self.path / name)

    def flush(self, names: Iterable[str], folders: bool = True) -> None:
        files = [self.path / name for name in names]
        files = [file for file in files if file.exists()]  # a chunk of nothing but fill values is not stored
        flush_to_disk(with_folders(files) if folders else files)


def draft_of(place: Path) -> Path:
    """A name of its own beside `place`: zarr's threads may still be writing into that of an attempt that failed."""
    return place.with_name(f".{place.name}.creating-{os.urandom(4).hex()}")


def remove_drafts(place: Path) -> None:
    """Of attempts that were killed. One that another process is at just now cannot come to anything any more."""
    for leftover in place.parent.glob(f".{escape(place.name)}.creating-*"):
        shutil.rmtree(leftover, ignore_errors=True)
