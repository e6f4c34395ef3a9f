"""Object stores, by the library obstore: opening one, and its errors as one line. Credentials come from the environment."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import MemoryStore, from_url

from minicache.errors import ConfigError, StoreError

if TYPE_CHECKING:
    from obstore.store import RetryConfig

RETRIES: "RetryConfig" = {"max_retries": 10, "retry_timeout": timedelta(minutes=3)}


def open_store(url: str, retries: "RetryConfig") -> Any:
    """The store at a URL, whose objects have names relative to it.

    Raises:
        ConfigError: the library does not know this kind of URL, or it is not complete.
    """
    if url.startswith("memory://"):
        return MemoryStore()
    try:
        return from_url(url, retry_config=retries)
    except (BaseError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{url}: expected s3://bucket/name, gs://bucket/name, az://container/name or a path: {_first_line(error)}"
        ) from error


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
    except (PermissionDeniedError, UnauthenticatedError) as error:
        raise StoreError(f"{url}: access was refused; check the credentials: {_first_line(error)}") from error
    except BaseError as error:
        # The error of listing a missing bucket.
        if "NoSuchBucket" in str(error):
            raise _no_bucket(url) from error
        # The address of the machine's own role, where the library looks for credentials last.
        if re.search(r"/latest/api/token|169\.254\.169\.254", str(error)):
            raise StoreError(
                f"{url}: found no credentials; expected them in the environment, as AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY, or from a role of this machine"
            ) from error
        raise StoreError(
            f"{url}: the object store cannot be reached or refuses; check network, credentials and URL, "
            f"then run the same command again: {_first_line(error)}"
        ) from error


def _no_bucket(url: str) -> StoreError:
    return StoreError(f"{url}: there is no such bucket; make it first, or check the URL")


def _first_line(error: Exception) -> str:
    text = str(error).split("<?xml")[0].strip()
    return text.splitlines()[0][:300] if text else type(error).__name__
