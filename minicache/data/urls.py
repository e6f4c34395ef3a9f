"""Data files at URLs, copied: objects of an object store, a folder of them or a glob; or one file of a web server."""

import os
import re
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from glob import has_magic
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from tempfile import mkstemp
from typing import Any, TypeVar
from urllib.error import HTTPError
from urllib.parse import urlsplit, urlunsplit
from urllib.request import Request, urlopen

from minicache.data.files import DataFile
from minicache.data.folders import MOST_ABOUT, Folder, Note, glob_pattern
from minicache.errors import ConfigError, DataError, StoreError
from minicache.failures import writing

# Seconds without a byte.
PATIENCE = 60
# Bytes.
AT_ONCE = 2**20
STORES = ("s3", "gs", "az", "memory")
Answer = TypeVar("Answer")


def fetch(url: str, scratch: Path, note: Note) -> list[DataFile]:
    """The files at a URL, copied into the directory `scratch`.

    Raises:
        DataError: there are none. StoreError: they cannot be reached. ConfigError: a URL of another kind, a library is missing.
    """
    scheme = url.partition("://")[0].lower()
    if scheme in ("http", "https"):
        return [_from_web(url, scratch)]
    if scheme in STORES:
        return _from_store(url, scratch, note)
    more = "; a data set of the Hub is named org/name" if scheme == "hf" else ""
    raise ConfigError(f"{url}: expected s3://, gs://, az://, https:// or a path{more}")


def copied(chunks: Iterable[bytes], name: str, scratch: Path) -> Path:
    """A new file in `scratch` with this content, which no other user can read. name: what is copied, for errors.

    Raises:
        OutputError: the disk is full or refuses.
    """
    where = f"a copy of {name} in {scratch.parent}"
    with writing(where):
        scratch.mkdir(exist_ok=True)
        descriptor, path = mkstemp(dir=scratch)
    with os.fdopen(descriptor, "wb") as file:
        for chunk in chunks:
            with writing(where):
                file.write(chunk)
        with writing(where):
            file.flush()
    return Path(path)


# --- web servers ---


def _from_web(url: str, scratch: Path) -> DataFile:
    # What a log keeps: passwords and signatures are in the rest.
    parts = urlsplit(url)
    name = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
    try:
        with urlopen(Request(url, headers={"User-Agent": "minidpo"}), timeout=PATIENCE) as answer:
            return DataFile(name, _body(answer, name, scratch))
    except HTTPError as error:
        error.close()
        kind = DataError if error.code in (404, 410) else StoreError
        raise kind(f"{name}: the server refuses: {error.code} {error.reason}; check the URL") from None
    except (OSError, HTTPException, ValueError) as error:
        raise StoreError(
            f"{name}: cannot be fetched; check the URL, then run the same command again: {error}"
        ) from error


def _body(answer: HTTPResponse, name: str, scratch: Path) -> Path:
    if answer.headers.get_content_type() == "text/html":
        raise DataError(f"{name}: is a web page; expected a file (a data set of the Hub is named org/name)")
    path = copied(iter(lambda: answer.read(AT_ONCE), b""), name, scratch)
    size, due = path.stat().st_size, answer.headers["Content-Length"]
    if due is not None and size != int(due):
        raise StoreError(
            f"{name}: the connection broke after {size:,} of {int(due):,} bytes; run the same command again"
        )
    return path


# --- object stores ---


@dataclass(frozen=True)
class _Bucket:
    """A bucket with data files. root: its URL."""

    root: str
    scratch: Path

    def has(self, key: str) -> bool:
        import obstore

        with suppress(FileNotFoundError):
            self._answer(lambda: obstore.head_async(store_at(self.root), key))
            return True
        return False

    def below(self, folder: str) -> list[str]:
        """The names of all objects below a folder, without the folder's own."""
        import obstore

        async def names() -> list[str]:
            listed = obstore.list(store_at(self.root), folder or None)
            return [item["path"] async for items in listed for item in items]

        return sorted(name.removeprefix(folder).lstrip("/") for name in self._answer(names))

    def chunks(self, key: str) -> Iterator[bytes]:
        import obstore

        found = self._answer(lambda: obstore.get_async(store_at(self.root), key))
        pieces = found.stream(AT_ONCE)
        with suppress(StopAsyncIteration):
            while True:
                yield bytes(self._answer(lambda: anext(pieces)))

    def _answer(self, request: Callable[[], Awaitable[Answer]]) -> Answer:
        with in_one_line(self.root):
            from minicache.objects import wait_for

            return wait_for(self.root, request)

    def get(self, key: str) -> DataFile:
        name = f"{self.root}/{key}"
        try:
            return DataFile(name, copied(self.chunks(key), name, self.scratch))
        except FileNotFoundError:
            raise DataError(f"{name}: the object is gone") from None


def _from_store(url: str, scratch: Path, note: Note) -> list[DataFile]:
    scheme, _, rest = url.partition("://")
    root, _, key = rest.partition("/")
    bucket = _Bucket(f"{scheme}://{root}", scratch)
    # Raises an error of one line where the library is missing.
    store_at(bucket.root)
    if has_magic(key):
        fixed = re.split(r"[*?[]", key)[0].rpartition("/")[0]
        fits = glob_pattern(key)
        keys = [
            name for name in (f"{fixed}/{each}".lstrip("/") for each in bucket.below(fixed)) if fits.fullmatch(name)
        ]
        if not keys:
            raise DataError(f"{url}: no object fits")
        return [bucket.get(each) for each in keys]
    if key and bucket.has(key):
        return [bucket.get(key)]
    folder, split = key.rstrip("/"), ""
    if not (names := bucket.below(folder)):
        found = re.fullmatch(r"(?P<folder>.*?)/?@(?P<split>[^@/]+)", folder)
        folder, split = (found["folder"], found["split"]) if found else (folder, "")
        names = bucket.below(folder) if found else []
    if not names:
        raise DataError(f"{url}: no such object, and none below it")
    below = f"{folder}/".lstrip("/")

    def read(name: str) -> str:
        content = b""
        for chunk in bucket.chunks(below + name):
            content += chunk
            # No more of it is used.
            if len(content) > MOST_ABOUT * 4:
                break
        return content.decode(errors="replace")

    chosen = Folder(f"{bucket.root}/{folder}".rstrip("/"), names, read).select("", split, note)
    return [bucket.get(below + name) for name in chosen]


@cache
def store_at(root: str) -> Any:
    """The store of a bucket; one for each URL, so that what is put into a memory:// store stays."""
    try:
        from minicache.objects import RETRIES, open_store
    except ModuleNotFoundError as error:
        if error.name != "obstore":
            raise
        raise ConfigError(f"{root}: object stores need another library; pip install 'minidpo[s3]'") from error
    return open_store(root, RETRIES)


@contextmanager
def in_one_line(root: str) -> Iterator[None]:
    """As `minicache.objects.in_one_line`; a missing object raises FileNotFoundError."""
    store_at(root)
    from minicache import objects

    with objects.in_one_line(root, missing_is_error=False):
        yield
