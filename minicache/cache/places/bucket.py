"""A cache in an object store: s3://, gs://, az:// and memory://, by the library obstore. Credentials come from the environment.

A PUT of one object is atomic, so a chunk is stored whole or not at all; nothing is ever renamed. The object that makes the others
a cache is written last. The library repeats requests that fail for a temporary reason (see RETRIES).
"""

import atexit
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, suppress
from datetime import timedelta
from functools import cache
from hashlib import blake2b
from pathlib import Path
from tempfile import gettempdir, mkdtemp
from typing import TYPE_CHECKING, Any

import obstore
from zarr.abc.store import ByteRequest, Store
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import ObjectStore

from minicache.cache.places.bounded import require_bounded_chunk
from minicache.cache.places.claims import CLAIM_FILE, Claim
from minicache.cache.places.leases import Lease
from minicache.cache.places.place import POLL_SECONDS, ROOT, Place
from minicache.errors import CacheNotFound, OutputError, StoreError
from minicache.objects import RETRIES, in_one_line, open_store

if TYPE_CHECKING:
    from obstore.store import RetryConfig

# Of claims: a late renewal is worthless.
HASTY: "RetryConfig" = {"max_retries": 3, "retry_timeout": timedelta(seconds=15)}
# What a killed creation leaves.
OURS = {"pairs", "ref", "ledger", "tokenizer", "refused.jsonl", CLAIM_FILE}


class Bucket(Place):
    """A place in an object store.

    objects: the store, with names relative to the place; claims: the same store with short timeouts.
    taken_over: whether another run has taken over the claim of this one, because it saw no renewal for a while.
    """

    def __init__(self, url: str, objects: Any, claims: Any) -> None:
        self.where = self.url = url
        self.objects, self.claims, self.taken_over = objects, claims, False
        self.home = Path(gettempdir()) / f"minidpo-{blake2b(url.encode(), digest_size=8).hexdigest()}"

    def locate(self, name: str) -> str:
        return f"{self.url}/{name}"

    # --- the whole ---

    def require_cache(self) -> None:
        if self.has(ROOT):
            return
        with self.in_one_line():
            # Raises another error if the bucket is missing.
            next(iter(obstore.list(self.objects)), None)
        raise CacheNotFound(
            f"{self}: no reference cache there; `minidpo precompute-ref --ref-cache {self} …` makes one"
        )

    def require_free(self, is_new: bool = False) -> None:
        """As `Place.require_free`; objects that a killed creation left may be overwritten."""
        if self.has(ROOT):
            raise OutputError(f"{self}: holds a reference cache; name another --ref-cache or remove it")
        for name in self._names():
            if name.split("/")[0] not in OURS:
                raise OutputError(f"{self}: holds other objects ({name}); name another --ref-cache")

    def publish(self, draft: Path) -> None:
        claim = self.claim(CLAIM_FILE)
        try:
            while not claim.take(alone=True):
                self.require_free()
                time.sleep(POLL_SECONDS)
            self.require_free()
            self._delete(name for name in self._names() if name != CLAIM_FILE)
            names = sorted(file.relative_to(draft).as_posix() for file in draft.rglob("*") if file.is_file())
            for name in names:
                if name not in (ROOT, CLAIM_FILE):
                    self.write(name, (draft / name).read_bytes())
            self.write(ROOT, (draft / ROOT).read_bytes())
        finally:
            claim.release()

    def remove(self) -> None:
        self._delete([ROOT])
        self._delete(name for name in self._names() if name != CLAIM_FILE)

    def store(self, read_only: bool) -> Store:
        return _Chunks(self, read_only)

    def claim(self, name: str) -> Claim:
        return Lease(self, name)

    def total_bytes(self) -> int:
        with self.in_one_line():
            return sum(item["size"] for items in obstore.list(self.objects) for item in items)

    def remove_leftovers(self) -> None:
        """Do nothing: an object is never half-written."""

    def remove_partial(self, folders: Iterable[str]) -> None:
        """Do nothing: an object is never half-written."""

    # --- single files ---

    def has(self, name: str) -> bool:
        with suppress(FileNotFoundError):
            self.size(name)
            return True
        return False

    def size(self, name: str) -> int:
        with self.in_one_line(missing_is_error=False):
            return obstore.head(self.objects, name)["size"]

    def read(self, name: str) -> bytes | None:
        with suppress(FileNotFoundError), self.in_one_line(missing_is_error=False):
            return bytes(obstore.get(self.objects, name).bytes())
        return None

    def write(self, name: str, content: bytes) -> None:
        self.require_held()
        with self.in_one_line():
            obstore.put(self.objects, name, content)

    def folder(self, name: str) -> Path:
        copy = Path(mkdtemp(prefix="minidpo-"))
        atexit.register(shutil.rmtree, copy, ignore_errors=True)
        for found in list(self._names(f"{name}/")):
            file = copy / found
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(self.read(found) or b"")
        return copy / name

    def put_folder(self, name: str, content: Path) -> None:
        self._delete(self._names(f"{name}/"))
        for file in (file for file in content.rglob("*") if file.is_file()):
            self.write(f"{name}/{file.relative_to(content).as_posix()}", file.read_bytes())

    def flush(self, names: Iterable[str], folders: bool = True) -> None:
        """Do nothing: a PUT that succeeded is durable."""

    def _names(self, prefix: str = "") -> Iterator[str]:
        with self.in_one_line():
            for items in obstore.list(self.objects, prefix):
                yield from (item["path"] for item in items)

    def _delete(self, names: Iterable[str]) -> None:
        self.require_held()
        with self.in_one_line():
            for name in list(names):
                with suppress(FileNotFoundError):
                    obstore.delete(self.objects, name)

    # --- errors ---

    def require_held(self) -> None:
        """Raises StoreError: another run has taken over the claim."""
        if self.taken_over:
            raise StoreError(
                f"{self}: another run went on with this cache, having seen nothing of this one for a while; "
                "wait for its end, then run the same command again"
            )

    def in_one_line(self, missing_is_error: bool = True) -> AbstractContextManager[None]:
        """As `minicache.objects.in_one_line`."""
        return in_one_line(self.url, missing_is_error)


class _Chunks(ObjectStore[Any]):
    """A place as a store of zarr, with errors of one line."""

    def __init__(self, place: Bucket, read_only: bool = False) -> None:
        super().__init__(place.objects, read_only=read_only)
        self.place = place

    def with_read_only(self, read_only: bool = False) -> "_Chunks":
        return _Chunks(self.place, read_only)

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        with self.place.in_one_line():
            buffer = await super().get(key, prototype, byte_range)
        require_bounded_chunk(key, buffer)
        return buffer

    async def exists(self, key: str) -> bool:
        with self.place.in_one_line():
            return await super().exists(key)

    async def set(self, key: str, value: Buffer) -> None:
        self.place.require_held()
        with self.place.in_one_line():
            await super().set(key, value)

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        self.place.require_held()
        with self.place.in_one_line():
            await super().set_if_not_exists(key, value)

    async def delete(self, key: str) -> None:
        self.place.require_held()
        with self.place.in_one_line():
            await super().delete(key)


# One for each URL: all its users share `taken_over`, and the objects of a memory:// store.
@cache
def bucket_at(url: str) -> Bucket:
    """The place at a URL. Raises ConfigError: the library does not know this kind of URL, or it is not complete."""
    if url.startswith("memory://"):
        memory = open_store(url, RETRIES)
        return Bucket(url, memory, memory)
    return Bucket(url, open_store(url, RETRIES), open_store(url, HASTY))
