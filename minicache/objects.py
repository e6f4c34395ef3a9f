"""Object stores, by the library obstore: opening one, its errors as one line, and what it sends in bounded memory.

Credentials come from the environment. All requests run in zarr's thread for input and output, so that a signal is heard while the
main thread waits for one of them: the library's own calls hear none until they end.
"""

import asyncio
import logging
import os
import re
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import obstore
from obstore.exceptions import BaseError, GenericError, PermissionDeniedError, UnauthenticatedError
from obstore.store import MemoryStore, from_url
from zarr.core.sync import sync

from minicache.errors import ConfigError, StoreError

if TYPE_CHECKING:
    from obstore import GetResult
    from obstore.store import RetryConfig

# How long a request that fails for a temporary reason is repeated, ever more seldom. The number of times is no limit: with the
# library's own ten, refusals that come at once end the repetitions after a few seconds.
RETRIES: "RetryConfig" = {
    "max_retries": 1000,
    "retry_timeout": timedelta(minutes=3),
    "backoff": {"init_backoff": timedelta(milliseconds=200), "base": 3, "max_backoff": timedelta(seconds=10)},
}
# How long a request may wait for the first byte of its answer, and for each further one.
PATIENCE = timedelta(minutes=1)
# How long one request may take in all, with the content of a large file.
LONGEST = timedelta(hours=1)
# Bytes.
PIECE = 2**20
# Settings of a client that the library reads from variables of the environment, such as AWS_ALLOW_HTTP, unless it is given some.
SETTINGS: tuple[str, ...] = (
    "allow_http",
    "allow_invalid_certificates",
    "connect_timeout",
    "proxy_url",
    "proxy_ca_certificate",
    "proxy_excludes",
)
SETTINGS += ("root_certificate", "user_agent", "timeout", "read_timeout")
PREFIXES = {"s3": "AWS_", "gs": "GOOGLE_", "az": "AZURE_"}
Answer = TypeVar("Answer")
# Seconds without an answer after which a line says so, and between two such lines.
SILENCE, AGAIN = 5.0, 60.0
# URL -> when it was last said that it is silent.
_said: dict[str, float] = {}
log = logging.getLogger(__name__)


def open_store(url: str, retries: "RetryConfig", longest: timedelta | None = None) -> Any:
    """The store at a URL, whose objects have names relative to it. longest: how long one request may take, if not LONGEST.

    Raises:
        ConfigError: the library does not know this kind of URL, or it is not complete.
    """
    if url.startswith("memory://"):
        return MemoryStore()
    prefix = PREFIXES.get(url[:2], "")
    given = {name: value for name in SETTINGS if (value := os.environ.get(f"{prefix}{name.upper()}"))} if prefix else {}
    client: Any = {"read_timeout": PATIENCE, "timeout": LONGEST, **given, **({"timeout": longest} if longest else {})}
    try:
        return from_url(url, retry_config=retries, client_options=client)
    except (BaseError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{url}: expected s3://bucket/name, gs://bucket/name, az://container/name or a path: {_first_line(error)}"
        ) from error


def wait_for(url: str, request: Callable[[], Awaitable[Answer]], most: float | None = None) -> Answer:
    """The answer to a request of the library. A signal ends the waiting, and not the request. Raises as the request.

    url: what a line names that is shown if it takes long. most: seconds to wait.

    Raises:
        TimeoutError: it takes longer.
    """

    async def answered() -> Answer:
        with noted_if_silent(url):
            return await asyncio.wait_for(request(), most)

    return sync(answered())


@contextmanager
def noted_if_silent(url: str) -> Iterator[None]:
    """Say what is waited for if the block takes long, which awaits an answer in a loop of asyncio."""
    timer = asyncio.get_running_loop().call_later(SILENCE, _say_that_it_is_silent, url)
    try:
        yield
    finally:
        timer.cancel()


def _say_that_it_is_silent(url: str) -> None:
    now = time.monotonic()
    if now - _said.get(url, -AGAIN) >= AGAIN:
        _said[url] = now
        # shown on stderr, also without --verbose
        log.warning("%s: the object store has not answered for %.0f s; waiting for it", url, SILENCE)


async def received(found: "GetResult", most: int) -> bytes:
    """The content of an object, which is received piece by piece.

    Raises:
        ValueError: it is larger than `most` bytes, by what the store says of it beforehand, or in fact.
    """
    if found.meta["size"] > most:
        raise ValueError(f"{found.meta['size']:,} bytes, expected {most:,} or fewer")
    parts, size = [], 0
    async for part in found.stream(PIECE):
        size += len(part)
        if size > most:
            raise ValueError(
                f"more than the {found.meta['size']:,} bytes that were announced, expected {most:,} or fewer"
            )
        parts.append(bytes(part))
    return b"".join(parts)


async def put_instead(store: Any, name: str, content: Any, found: Mapping[str, Any] | None, seconds: float = 0) -> Any:
    """Put an object on the condition that it is still as it was found (None: that there is none); returns its new version.

    seconds: how long a PUT that found no answer is repeated, which the library does only without a condition. A condition that no
    longer holds may then be due to this call itself.

    Raises:
        AlreadyExistsError, PreconditionError: it has changed. FileNotFoundError: it is gone, or the bucket. BaseError.
    """
    mode: Any = "create" if found is None else {key: found[key] for key in ("e_tag", "version") if found.get(key)}
    begun = time.monotonic()
    while True:
        try:
            return await obstore.put_async(store, name, content, mode=mode)
        except GenericError as error:
            if "kind: Timeout" not in str(error) or time.monotonic() - begun > seconds:
                raise


@contextmanager
def in_one_line(url: str, missing_is_error: bool = True) -> Iterator[None]:
    """Turn the library's exceptions into a StoreError of one line.

    missing_is_error: whether a missing object means a missing bucket; otherwise FileNotFoundError passes.
    """
    try:
        yield
    except FileNotFoundError as error:
        if not missing_is_error:
            raise
        raise _no_bucket(url) from error
    except BaseError as error:
        raise _told(url, error) from error


def _told(url: str, error: BaseError) -> StoreError:
    """The library's exception as one line that says what to do."""
    text = str(error)
    # Before all others: S3 answers so with status 400 or 403.
    if re.search("ExpiredToken|TokenRefreshRequired|RequestExpired|token (has )?expired", text, re.IGNORECASE):
        return StoreError(
            f"{url}: the credentials have expired; renew them, then run the same command again: {_first_line(error)}"
        )
    if isinstance(error, PermissionDeniedError | UnauthenticatedError):
        return StoreError(f"{url}: access was refused; check the credentials: {_first_line(error)}")
    # The error of listing a missing bucket.
    if "NoSuchBucket" in text:
        return _no_bucket(url)
    # The address of the machine's own role, where the library looks for credentials last.
    if re.search(r"/latest/api/token|169\.254\.169\.254", text):
        return StoreError(
            f"{url}: found no credentials; expected them in the environment, as AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or from a role of this machine"
        )
    if re.search("SlowDown|TooManyRequests|ServerBusy| 429 ", text):
        return StoreError(
            f"{url}: the object store asks for fewer requests; what was finished stays: "
            f"wait a while, then run the same command again: {_first_line(error)}"
        )
    return StoreError(
        f"{url}: the object store cannot be reached or refuses; check network, credentials and URL, "
        f"then run the same command again: {_first_line(error)}"
    )


def _no_bucket(url: str) -> StoreError:
    return StoreError(f"{url}: there is no such bucket; make it first, or check the URL")


def _first_line(error: Exception) -> str:
    text = str(error).split("<?xml")[0].strip()
    return text.splitlines()[0][:300] if text else type(error).__name__
