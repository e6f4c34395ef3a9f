"""A claim where there are no locks: an object that its holder keeps writing anew.

Who finds one that is not written anew for LEASE_SECONDS takes it over, by a PUT on condition that it is still the same object.
Nobody's clock is compared with another's. The holder finds out at its next renewal, and stops writing.
"""

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from typing import Any, Protocol

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError

from minicache.cache.manifest import now

LEASE_SECONDS = 60.0  # the network may be away for so long; a kill costs so much
RENEWALS = 6  # in that time


class Leased(Protocol):
    """What a lease needs of the place that it is for.

    claims: the object store, with little patience. taken_over: set when another run was found to hold the lease.
    """

    claims: Any
    taken_over: bool

    def told(self) -> AbstractContextManager[None]:
        """Turns what the library raises into a `StoreError`."""

    def has(self, name: str) -> bool:
        """Whether there is an object of this name."""


class Lease:
    """An object in a bucket and this process's hold on it. To hold it together, it is enough that nobody has it alone."""

    is_safe = True

    def __init__(self, place: Leased, name: str) -> None:
        self.place, self.name, self.is_alive = place, name, False
        self._seen: tuple[str | None, float] | None = None  # another's: its e-tag, and since when it is the same
        self._version: Mapping[str, Any] | None = None  # ours, as it is there now
        self._ended = threading.Event()
        self._renewing: threading.Thread | None = None
        self._id, self._count = secrets.token_hex(8), 0

    def take(self, alone: bool) -> bool:
        """Raises StoreError: the object store cannot be reached, or refuses."""
        with self.place.told():
            if not alone and self._renewing is None and not self.place.has(self.name):
                return True
            if self._renewing is None and not self._acquire():
                return False
        if not alone:
            self.release()
        return True

    def _acquire(self) -> bool:
        try:
            found = obstore.head(self.place.claims, self.name)
        except FileNotFoundError:
            found = None
        if found is not None and not self._is_abandoned(found["e_tag"]):
            return False
        if not self._put(found):
            return False
        self.place.taken_over = False
        self._ended.clear()
        self._renewing = threading.Thread(target=self._renew, daemon=True)
        self._renewing.start()
        return True

    def _is_abandoned(self, e_tag: str | None) -> bool:
        if self._seen is None or self._seen[0] != e_tag:
            self.is_alive = self._seen is not None
            self._seen = e_tag, time.monotonic()
        return time.monotonic() - self._seen[1] >= LEASE_SECONDS

    def _put(self, found: Mapping[str, Any] | None) -> bool:
        """Write it in the place of what was found there, None for nothing. Whether that was still so."""
        self._count += 1
        host, pid = socket.gethostname(), os.getpid()
        content = json.dumps(
            {"host": host, "pid": pid, "written": now(), "count": self._count, "id": self._id}
        ).encode()
        mode: Any = "create"
        if found is not None:
            mode = {key: found[key] for key in ("e_tag", "version") if found.get(key)}
        try:
            self._version = obstore.put(self.place.claims, self.name, content, mode=mode)
        except FileNotFoundError:
            if found is None:
                raise  # not even the bucket is there
            return False
        except (AlreadyExistsError, PreconditionError):
            # A PUT that was repeated, because its answer was lost, finds itself there.
            with suppress(FileNotFoundError):
                there = obstore.get(self.place.claims, self.name)
                if bytes(there.bytes()) == content:
                    self._version = there.meta
                    return True
            return False
        return True

    def _renew(self) -> None:
        while not self._ended.wait(LEASE_SECONDS / RENEWALS):
            with suppress(BaseError):  # it may come back before anybody takes the lease over
                if not self._put(self._version):
                    self.place.taken_over = True
                    return

    def release(self) -> None:
        """Never raises: what cannot be deleted now, the next one takes over after a while."""
        if self._renewing is None:
            return
        self._ended.set()
        self._renewing.join()
        self._renewing = None
        with suppress(BaseError, FileNotFoundError):
            if not self.place.taken_over:
                obstore.delete(self.place.claims, self.name)

    def remove(self) -> None:
        self.release()
