"""What a directory and a place in an object store can both do; the rest of the program does not ask which of them it has."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path

from zarr.abc.store import Store

from minicache.cache.places.claims import Claim
from minicache.options.where import Where

ROOT = "zarr.json"  # the file that makes a cache of what lies there: comes last, goes first
POLL_SECONDS = 1.0  # between two looks whether the holder of a claim is still alive


class Place(ABC):
    """Where one cache lies. Files in it have names such as `pairs/tokens/c/0/0`.

    where: as a user writes it, for messages and to open it again. home: the path beside which a draft of the cache is made.
    Failures of an object store raise StoreError; on a disk, reading raises OSError and writing OutputError.
    """

    where: Where
    home: Path

    def __str__(self) -> str:
        return str(self.where)

    @abstractmethod
    def locate(self, name: str) -> Where:
        """The path or URL of a file in it."""

    # --- the whole ---

    @abstractmethod
    def require_cache(self) -> None:
        """Raises CacheNotFound: no cache lies here."""

    @abstractmethod
    def require_free(self, is_new: bool = False) -> None:
        """Raises OutputError if something lies here; with `is_new`, even if it is an empty directory."""

    @abstractmethod
    def publish(self, draft: Path) -> None:
        """Put the directory `draft` here, all of it at once or not at all. Raises OutputError: something lies here."""

    @abstractmethod
    def remove(self) -> None:
        """Delete everything here; at no time do readers find half a cache."""

    @abstractmethod
    def store(self, read_only: bool) -> Store:
        """The place as a store of zarr."""

    @abstractmethod
    def claim(self, name: str) -> Claim:
        """A claim of this name, not held yet."""

    @abstractmethod
    def total_bytes(self) -> int:
        """The bytes of all files that lie here now."""

    @abstractmethod
    def remove_leftovers(self) -> None:
        """Delete what killed writers left half-written. Only while no other process writes."""

    @abstractmethod
    def remove_partial(self, folders: Iterable[str]) -> None:
        """Delete such leftovers in some folders. Only while no other process writes there."""

    # --- single files ---

    @abstractmethod
    def has(self, name: str) -> bool: ...

    @abstractmethod
    def size(self, name: str) -> int:
        """Bytes of a file; raises OSError (FileNotFoundError among them) if it cannot be looked at."""

    @abstractmethod
    def read(self, name: str) -> bytes | None:
        """The content of a file; None if there is no such file."""

    @abstractmethod
    def write(self, name: str, content: bytes) -> None:
        """Make or replace a file, whole or not at all."""

    @abstractmethod
    def folder(self, name: str) -> Path:
        """A directory with the files below this name. It may be a copy, and is missing if there are no such files."""

    @abstractmethod
    def put_folder(self, name: str, content: Path) -> None:
        """Replace the files below this name by those of the directory `content`."""

    @abstractmethod
    def flush(self, names: Iterable[str], folders: bool = True) -> None:
        """Make files survive a power loss; with `folders`, their names too."""
