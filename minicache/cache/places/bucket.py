"""A cache in an object store: s3://, gs://, az:// and memory://, by the library obstore. Credentials come from the environment.

A PUT of one object is atomic, so a chunk is stored whole or not at all; nothing is ever renamed. The object that makes the others
a cache is written last. The library repeats requests that fail for a temporary reason (see RETRIES).

A PUT may arrive long after it was begun: it was repeated, or the process was stopped. So each says which version it replaces, and
fails once another process has changed the object; then this one looks whether it still holds its claim.
"""

import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import timedelta
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import obstore
from obstore.exceptions import AlreadyExistsError, PreconditionError
from zarr.abc.store import ByteRequest, Store
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import ObjectStore

from minicache.cache.places import bounded
from minicache.cache.places.claims import CLAIM_FILE, Claim
from minicache.cache.places.leases import Followed, Lease
from minicache.cache.places.place import POLL_SECONDS, ROOT, Place
from minicache.disk import kept_scratch_folder, temporary_directory
from minicache.errors import CacheNotFound, OutputError, StoreError
from minicache.failures import writing
from minicache.objects import RETRIES, Answer, in_one_line, noted_if_silent, open_store, put_instead, received, wait_for

if TYPE_CHECKING:
    from obstore.store import RetryConfig

# Of claims: a late renewal is worthless.
HASTY: "RetryConfig" = {**RETRIES, "retry_timeout": timedelta(seconds=15)}
HASTY_LONGEST = timedelta(seconds=10)
# Times to put an object that another process changes.
ATTEMPTS = 5
# What a killed creation leaves.
OURS = {"pairs", "ref", "ledger", "tokenizer", "refused.jsonl", CLAIM_FILE}


class Bucket(Place):
    """A place in an object store.

    objects: the store, with names relative to the place; claims: the same store with short timeouts. leases: the claims that this
    process holds or follows, or has lost to another.
    """

    def __init__(self, url: str, objects: Any, claims: Any) -> None:
        self.where = self.url = url
        self.objects, self.claims = objects, claims
        self.leases: set[Lease | Followed] = set()
        # The objects that this process has put, by their names, as it left them.
        self._known: dict[str, Mapping[str, Any]] = {}
        self.home = temporary_directory() / f"minidpo-{blake2b(url.encode(), digest_size=8).hexdigest()}"

    def locate(self, name: str) -> str:
        return f"{self.url}/{name}"

    # --- the whole ---

    def require_cache(self) -> None:
        if self.has(ROOT):
            return
        # Raises another error if the bucket is missing.
        self._listed(until=lambda _: True)
        raise CacheNotFound(
            f"{self}: no reference cache there; `minidpo precompute-ref --ref-cache {self} …` makes one"
        )

    def require_free(self, is_new: bool = False) -> None:
        """As `Place.require_free`; objects that a killed creation left may be overwritten."""
        if self.has(ROOT):
            raise OutputError(f"{self}: holds a reference cache; name another --ref-cache or remove it")
        for item in self._listed(until=_is_foreign):
            if _is_foreign(item):
                raise OutputError(f"{self}: holds other objects ({item['path']}); name another --ref-cache")

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

    def held(self) -> list[tuple[str, str]]:
        return [(lease.name, lease.id) for lease in self.leases]

    @contextmanager
    def following(self, held: Iterable[tuple[str, str]]) -> Iterator[None]:
        followed = {Followed(self, name, id) for name, id in held}
        self.leases |= followed
        try:
            yield
        finally:
            self.leases -= followed

    def total_bytes(self) -> int:
        return sum(item["size"] for item in self._listed())

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
        return int(self._wait(lambda: obstore.head_async(self.objects, name), missing_is_error=False)["size"])

    def read(self, name: str) -> bytes | None:
        return self._read(name, bounded.MOST_IN_A_LIST)

    def _read(self, name: str, most: int) -> bytes | None:
        async def get() -> bytes:
            return await received(await obstore.get_async(self.objects, name), most)

        try:
            return self._wait(get, missing_is_error=False)
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise bounded.too_large(self.locate(name), error) from error

    def write(self, name: str, content: bytes) -> None:
        self._wait(lambda: self.put(name, content))

    async def put(self, name: str, content: Any) -> None:
        """Create or replace an object.

        Raises:
            StoreError: another process has taken over a claim of this one. BaseError: as the library.
        """
        await self._require_held()
        version, seconds = self._known.get(name), RETRIES["retry_timeout"].total_seconds()
        for _ in range(ATTEMPTS):
            try:
                self._known[name] = await put_instead(self.objects, name, content, version, seconds)
                return
            except (AlreadyExistsError, PreconditionError, FileNotFoundError) as error:
                # Without a version: the bucket is missing.
                if version is None and isinstance(error, FileNotFoundError):
                    raise
                # In this order: nothing that another process changes after the claim was confirmed is replaced.
                version = await self._version(name)
                await self._require_held(is_doubtful=True)
        raise StoreError(f"{self.locate(name)}: another process writes this object; wait for its end")

    async def _version(self, name: str) -> Mapping[str, Any] | None:
        with suppress(FileNotFoundError):
            return await obstore.head_async(self.objects, name)
        return None

    def folder(self, name: str) -> Path:
        copy = kept_scratch_folder("bucket")
        room = bounded.MOST_IN_A_FOLDER
        for found in self._names(f"{name}/"):
            content = self._read(found, room) or b""
            room -= len(content)
            with writing(f"a copy of {self.locate(found)}"):
                (copy / found).parent.mkdir(parents=True, exist_ok=True)
                (copy / found).write_bytes(content)
        return copy / name

    def put_folder(self, name: str, content: Path) -> None:
        self._delete(self._names(f"{name}/"))
        for file in (file for file in content.rglob("*") if file.is_file()):
            self.write(f"{name}/{file.relative_to(content).as_posix()}", file.read_bytes())

    def flush(self, names: Iterable[str], folders: bool = True) -> None:
        """Do nothing: a PUT that succeeded is durable."""

    def _names(self, prefix: str = "") -> list[str]:
        return [item["path"] for item in self._listed(prefix)]

    def _listed(self, prefix: str = "", until: Callable[[Any], bool] = lambda _: False) -> list[Any]:
        """What is known of each object; of all up to the first for which `until` is true."""

        async def collect() -> list[Any]:
            found = []
            async for items in obstore.list(self.objects, prefix):
                for item in items:
                    found.append(item)
                    if until(item):
                        return found
            return found

        return self._wait(collect)

    def _delete(self, names: Iterable[str]) -> None:
        async def delete() -> None:
            for name in names:
                await self.delete(name)

        self._wait(delete)

    async def delete(self, name: str) -> None:
        """Delete an object, if there is one. A DELETE has no condition, so it is not repeated for longer than a claim lasts.

        Raises:
            StoreError: another process has taken over a claim of this one. BaseError: as the library.
        """
        await self._require_held()
        self._known.pop(name, None)
        with suppress(FileNotFoundError):
            await obstore.delete_async(self.claims, name)

    # --- errors ---

    async def _require_held(self, is_doubtful: bool = False) -> None:
        """Raises StoreError: another run has taken over a claim. is_doubtful: as for `Lease.confirm`."""
        for lease in tuple(self.leases):
            await lease.confirm(is_doubtful)
        if any(lease.is_lost for lease in self.leases):
            raise StoreError(
                f"{self}: another run went on with this cache, having seen nothing of this one for a while; "
                "wait for its end, then run the same command again"
            )

    def _wait(self, request: Callable[[], Awaitable[Answer]], missing_is_error: bool = True) -> Answer:
        """The answer to a request, with errors of one line."""
        with self.in_one_line(missing_is_error):
            return wait_for(self.url, request)

    def in_one_line(self, missing_is_error: bool = True) -> AbstractContextManager[None]:
        """As `minicache.objects.in_one_line`."""
        return in_one_line(self.url, missing_is_error)


def _is_foreign(item: Any) -> bool:
    """Whether an object is none that a killed creation leaves."""
    return item["path"].split("/")[0] not in OURS


class _Chunks(ObjectStore[Any]):
    """A place as a store of zarr, with errors of one line."""

    def __init__(self, place: Bucket, read_only: bool = False) -> None:
        super().__init__(place.objects, read_only=read_only)
        self.place = place

    def with_read_only(self, read_only: bool = False) -> "_Chunks":
        return _Chunks(self.place, read_only)

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        if byte_range is not None:
            raise ValueError("expected to read a whole chunk")
        try:
            with self.place.in_one_line(missing_is_error=False), noted_if_silent(self.place.url):
                content = await received(await obstore.get_async(self.store, key), bounded.MOST_BYTES)
        except FileNotFoundError:
            return None
        buffer = prototype.buffer.from_bytes(content)
        bounded.require_bounded_chunk(key, buffer)
        return buffer

    async def exists(self, key: str) -> bool:
        with self.place.in_one_line(), noted_if_silent(self.place.url):
            return await super().exists(key)

    async def set(self, key: str, value: Buffer) -> None:
        self._check_writable()
        with self.place.in_one_line(), noted_if_silent(self.place.url):
            await self.place.put(key, value.as_buffer_like())

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        if not await self.exists(key):
            await self.set(key, value)

    async def delete(self, key: str) -> None:
        self._check_writable()
        with self.place.in_one_line(), noted_if_silent(self.place.url):
            await self.place.delete(key)


# One for each URL: all its users share the claims, and the objects of a memory:// store.
@cache
def bucket_at(url: str) -> Bucket:
    """The place at a URL. Raises ConfigError: the library does not know this kind of URL, or it is not complete."""
    if url.startswith("memory://"):
        memory = open_store(url, RETRIES)
        return Bucket(url, memory, memory)
    return Bucket(url, open_store(url, RETRIES), open_store(url, HASTY, HASTY_LONGEST))
