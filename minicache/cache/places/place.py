"""Where a cache lies: a directory, or a place in an object store. What both can do; nobody else asks which of them it is."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path

from zarr.abc.store import Store

from minicache.cache.places.claims import Claim
from minicache.options.where import Where

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
