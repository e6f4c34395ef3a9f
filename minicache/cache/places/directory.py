"""A cache in a directory."""

import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from glob import escape
from pathlib import Path

from zarr.abc.store import Store

from minicache.cache.places.bounded import BoundedStore, read_list
from minicache.cache.places.claims import SHARD_CLAIMS, Claim, FileClaim
from minicache.cache.places.place import ROOT, Place
from minicache.disk import flush_to_disk, move, publish_folder, with_folders, written_whole
from minicache.drafts import draft_of, remove_leftovers
from minicache.errors import CacheNotFound, OutputError
from minicache.failures import writing

# Leftovers of killed writers: claims of shards; drafts of single files, by their present names and by those of 0.1.0.
LEFTOVERS = (f"{SHARD_CLAIMS}*", ".*.draft", "refused.tmp")


class Directory(Place):
    """A place in a directory, on a local or a mounted file system."""

    def __init__(self, path: Path) -> None:
        self.where = self.path = path

    @property
    def home(self) -> Path:  # type: ignore[override]
        # Beside the target of a link: renaming a draft over the link would replace it.
        return self.path.resolve()

    def locate(self, name: str) -> Path:
        return self.path / name

    def require_cache(self) -> None:
        path = self.path
        try:
            is_directory, is_cache = path.is_dir(), (path / ROOT).is_file()
        except OSError as error:
            raise CacheNotFound(f"{path}: cannot be accessed: {error.strerror}") from error
        if not is_directory:
            if path.exists():
                raise CacheNotFound(f"{path}: is a file, no cache; `minidpo import-cache` reads files of `export`")
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
        if path.exists() and (not path.is_dir() or any(path.iterdir()) or path.samefile(os.curdir)):
            raise OutputError(f"{path}: exists and is no reference cache; name another --ref-cache or remove it")

    def publish(self, draft: Path) -> None:
        # of files that another program held, on Windows, when zarr would have removed them
        self._unlink(list(draft.rglob("*.partial")))
        with writing(self):
            publish_folder(draft, self.home)

    def remove(self) -> None:
        place = self.home
        dead = draft_of(place)
        try:
            move(place, dead)
        except OSError:
            # The folder above it cannot be written to.
            dead = place
        shutil.rmtree(dead, ignore_errors=True)

    def store(self, read_only: bool) -> Store:
        return BoundedStore(self.path, read_only=read_only)

    def claim(self, name: str) -> Claim:
        return FileClaim(self.path / name)

    def total_bytes(self) -> int:
        total = 0
        for file in self.path.rglob("*"):
            # A running stage one may rename or remove a file meanwhile.
            with suppress(OSError):
                total += file.stat().st_size if file.is_file() else 0
        return total

    def remove_leftovers(self) -> None:
        leftovers = [found for pattern in LEFTOVERS for found in self.path.glob(pattern)]
        self._unlink([*self.path.rglob("*.partial"), *leftovers])
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
        return read_list(self.path / name) if self.has(name) else None

    def write(self, name: str, content: bytes) -> None:
        with written_whole(self.path / name) as draft:
            draft.write_bytes(content)

    def folder(self, name: str) -> Path:
        return self.path / name

    def put_folder(self, name: str, content: Path) -> None:
        with writing(self.path / name):
            shutil.rmtree(self.path / name, ignore_errors=True)
            shutil.copytree(content, self.path / name)

    def flush(self, names: Iterable[str], folders: bool = True) -> None:
        # A chunk that contains only fill values is not stored.
        files = [file for file in (self.path / name for name in names) if file.exists()]
        flush_to_disk(with_folders(files) if folders else files)


def remove_drafts(place: Path) -> None:
    """Remove what killed calls left of drafts of a cache at `place`, this version's and 0.1.0's."""
    remove_leftovers(place.parent, place.name)
    for leftover in place.parent.glob(f".{escape(place.name)}.creating-*"):
        shutil.rmtree(leftover, ignore_errors=True)
