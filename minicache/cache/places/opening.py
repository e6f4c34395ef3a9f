"""The place of a cache by the user's path or URL, and holding it alone."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from minicache.cache.places.claims import CLAIM_FILE, Claim
from minicache.cache.places.directory import Directory
from minicache.cache.places.hub import snapshot_at
from minicache.cache.places.place import POLL_SECONDS, Place
from minicache.errors import ConfigError, OutputError
from minicache.options.where import HUB, Where, local_path


def place_at(where: Where) -> Place:
    """The place at a path or URL.

    Raises:
        ConfigError: it is empty, or a URL and the library for object stores is missing or does not know its scheme.
    """
    if where == "":
        raise ConfigError("expected the path of a cache, got an empty one (a shell variable that is not set?)")
    path = local_path(where)
    if path is not None:
        return Directory(path)
    if str(where).startswith(HUB):
        return snapshot_at(str(where).rstrip("/"))
    try:
        from minicache.cache.places.bucket import bucket_at
    except ModuleNotFoundError as error:
        if error.name != "obstore":
            raise
        raise ConfigError(f"{where}: object stores need another library; pip install 'minidpo[s3]'") from error
    return bucket_at(str(where).rstrip("/"))


def take_alone(claim: Claim) -> bool:
    """Hold a claim alone; returns False if its holder is alive. Waits until that is known."""
    while not claim.take(alone=True):
        if claim.is_alive:
            return False
        time.sleep(POLL_SECONDS)
    return True


@contextmanager
def claimed(where: Where) -> Iterator[None]:
    """Keep other runs from writing into a cache within the block. One process of a run calls it.

    Raises:
        OutputError: another run writes into this cache.
    """
    claim = place_at(where).claim(CLAIM_FILE)
    try:
        if not take_alone(claim):
            raise OutputError(f"{where}: another precompute-ref is writing into this cache; wait for its end")
        yield
    finally:
        claim.release()
