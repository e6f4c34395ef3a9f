"""A cache in a data set of the Hugging Face Hub, `hf://datasets/org/name@revision`: read only, at one commit.

Its files are downloaded into the library's own directory (HF_HOME), where a killed call finds them again, and other calls find
them without a network. A repository may hold other files; those are left.
"""

import re
import shutil
from functools import cache, cached_property
from pathlib import Path
from typing import NoReturn

from zarr.abc.store import Store

from minicache.cache.places.directory import Directory
from minicache.cache.places.place import ROOT
from minicache.disk import kept_scratch_folder
from minicache.errors import CacheNotFound, ConfigError, OutputError
from minicache.failures import writing
from minicache.hub import ID, endpoint, in_one_line, listing, quiet
from minicache.options.where import HUB, Where

# A revision with a slash is a pull request or a conversion; another slash begins a folder of the repository.
URL = re.compile(
    rf"{re.escape(HUB)}datasets/(?P<id>{ID.pattern})(?:@(?P<revision>refs/(?:pr|convert)/[^/]+|[^/]+))?(?:/(?P<folder>.*))?"
)
# The files of a cache.
PATTERNS = (ROOT, "pairs/**", "ref/**", "ledger/**", "tokenizer/**", "refused.jsonl")
COMMIT = re.compile("[0-9a-f]{40}")


class Snapshot(Directory):
    """The cache at one commit of a data set. Nothing is asked of the network before the first file is needed.

    where: the URL as it was given; from the first look at it on, that of the commit.
    """

    def __init__(self, url: str, id: str, revision: str, folder: str) -> None:
        self.where = self.url = url
        self.id, self.revision, self.below = id, revision, folder.strip("/")

    @cached_property
    def commit(self) -> str:
        """The commit of the revision, or of the default branch."""
        if COMMIT.fullmatch(self.revision):
            return self.revision
        from huggingface_hub import constants

        if constants.HF_HUB_OFFLINE:
            # It is the name of the folder.
            return self._download(self.revision).name
        return listing(self.url, self.id, self.revision)[0]

    @property
    def pinned(self) -> str:
        """The URL of this commit."""
        return f"{HUB}datasets/{self.id}@{self.commit}" + (f"/{self.below}" if self.below else "")

    @cached_property
    def path(self) -> Path:  # type: ignore[override]
        """The directory with the files, which are downloaded as far as they are not there."""
        return self._download(self.commit) / self.below

    def _download(self, revision: str) -> Path:
        from huggingface_hub import constants, snapshot_download

        patterns = [f"{self.below}/{pattern}".lstrip("/") for pattern in PATTERNS]
        with in_one_line(self.url, "dataset", self.id), quiet():
            folder = snapshot_download(
                self.id,
                repo_type="dataset",
                revision=revision or None,
                allow_patterns=patterns,
                endpoint=endpoint(),
                local_files_only=constants.HF_HUB_OFFLINE,
            )
        return Path(folder)

    def require_cache(self) -> None:
        if not self.has(ROOT):
            place = f"in its folder {self.below}" if self.below else "at its top"
            raise CacheNotFound(
                f"{self.pinned}: no reference cache {place} (there is no {ROOT}); `minidpo push` puts one there"
            )
        self.where = self.pinned

    def locate(self, name: str) -> Where:  # type: ignore[override]
        return f"{self.where}/{name}"

    def folder(self, name: str) -> Path:
        # A copy: the library's directory holds links.
        copy = kept_scratch_folder("hub")
        if (self.path / name).is_dir():
            with writing(copy):
                shutil.copytree(self.path / name, copy / name)
        return copy / name

    # --- what writes ---

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise OutputError(f"{self.url}: is read only; make the cache elsewhere, then `minidpo push CACHE org/name`")

    require_free = publish = remove = claim = remove_leftovers = remove_partial = write = put_folder = _refuse

    def store(self, read_only: bool) -> Store:
        return super().store(read_only) if read_only else self._refuse()


# One for each URL: all its users see one commit.
@cache
def snapshot_at(url: str) -> Snapshot:
    """The place at a URL. Raises ConfigError: it has another form."""
    found = URL.fullmatch(url)
    if not found:
        raise ConfigError(
            f"{url}: expected {HUB}datasets/org/name, with @revision behind it for a branch, a tag or a commit"
        )
    return Snapshot(url, found["id"], found["revision"] or "", found["folder"] or "")


def pinned(where: Where) -> Where:
    """A place of the Hub at the commit that it has now; any other place as it is."""
    return snapshot_at(str(where).rstrip("/")).pinned if str(where).startswith(HUB) else where
