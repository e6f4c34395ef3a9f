"""The interface of a cache's place, which is a directory or a part of an object store; the rest of the program need not know."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from zarr.abc.store import Store

from minicache.cache.places.claims import Claim
from minicache.options.where import Where

# The file that makes a cache of the others: written last, removed first.
ROOT = "zarr.json"
# Seconds between two checks whether the holder of a claim is alive.
POLL_SECONDS = 1.0


class Place(ABC):
    """The place of one cache. Files in it have names such as `pairs/tokens/c/0/0`.

    where: path or URL as the user gave it. home: the path beside which a draft of the cache is made.
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
        """Raises CacheNotFound: there is no cache here."""

    @abstractmethod
    def require_free(self, is_new: bool = False) -> None:
        """Raises OutputError: there is something here; with `is_new`, even an empty directory is refused."""

    @abstractmethod
    def publish(self, draft: Path) -> None:
        """Move the directory `draft` here, completely or not at all. Raises OutputError: there is something here."""

    @abstractmethod
    def remove(self) -> None:
        """Delete everything here, in such a way that no reader finds half a cache."""

    @abstractmethod
    def store(self, read_only: bool) -> Store:
        """The place as a store of zarr."""

    @abstractmethod
    def claim(self, name: str) -> Claim:
        """A claim of this name, not held yet."""

    def held(self) -> list[tuple[str, str]]:
        """Names and holders of the claims that this process may lose to another while it works; a lock is none of them."""
        return []

    def following(self, held: Iterable[tuple[str, str]]) -> AbstractContextManager[None]:
        """Within this context this process writes under claims that another one holds. held: what that one's `held` says."""
        return nullcontext()

    @abstractmethod
    def total_bytes(self) -> int:
        """The number of bytes of all files here."""

    @abstractmethod
    def remove_leftovers(self) -> None:
        """Delete unfinished files of killed writers. No other process may write here meanwhile."""

    @abstractmethod
    def remove_partial(self, folders: Iterable[str]) -> None:
        """Delete unfinished files in some folders. No other process may write into these meanwhile."""

    # --- single files ---

    @abstractmethod
    def has(self, name: str) -> bool: ...

    @abstractmethod
    def size(self, name: str) -> int:
        """The number of bytes of a file. Raises OSError: there is no such file (FileNotFoundError), or no access."""

    @abstractmethod
    def read(self, name: str) -> bytes | None:
        """The content of a file; None if there is no such file. Raises CacheDamaged: it is larger than any list in a cache."""

    @abstractmethod
    def write(self, name: str, content: bytes) -> None:
        """Create or replace a file, completely or not at all."""

    @abstractmethod
    def folder(self, name: str) -> Path:
        """A directory with the files below this name, perhaps a copy. It does not exist if there are no such files."""

    @abstractmethod
    def put_folder(self, name: str, content: Path) -> None:
        """Replace the files below this name by those of the directory `content`."""

    @abstractmethod
    def flush(self, names: Iterable[str], folders: bool = True) -> None:
        """Flush files, so that they survive a power loss; with `folders`, their names too."""
