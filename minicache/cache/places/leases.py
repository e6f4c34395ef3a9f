"""A claim where there are no locks: an object that its holder keeps rewriting.

A process that sees no rewrite for LEASE_SECONDS takes it over, by a PUT on condition that it is still the same object. Clocks of
different machines are never compared. The former holder finds out at its next renewal and stops writing.
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

LEASE_SECONDS = 60.0  # how long the network may be away, and how long others wait after a kill
RENEWALS = 6  # in that time


class Leased(Protocol):
    """What a lease needs of its place.

    claims: the object store, with little patience. taken_over: set when another run was found to hold the lease.
    """

    claims: Any
    taken_over: bool

    def in_one_line(self) -> AbstractContextManager[None]:
        """Turns what the library raises into a `StoreError`."""

    def has(self, name: str) -> bool:
        """Whether there is an object of this name."""


class Lease:
    """An object in a bucket and this process's hold on it. It is held together where no process holds it alone."""

    is_safe = True

    def __init__(self, place: Leased, name: str) -> None:
        self.place, self.name, self.is_alive = place, name, False
        self._seen: tuple[str | None, float] | None = (
            None  # another holder's e-tag, and since when it has been the same
        )
        self._version: Mapping[str, Any] | None = None  # of our object, as it is stored now
        self._ended = threading.Event()
        self._renewing: threading.Thread | None = None
        self._id, self._count = secrets.token_hex(8), 0

    def take(self, alone: bool) -> bool:
        """Raises StoreError: the object store cannot be reached, or refuses."""
        with self.place.in_one_line():
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
        """Replace the object that was found (None: there was none). Returns whether it was still the same."""
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
                raise  # the bucket is missing
            return False
        except (AlreadyExistsError, PreconditionError):
            # A PUT that was repeated because its answer was lost finds its own object.
            with suppress(FileNotFoundError):
                there = obstore.get(self.place.claims, self.name)
                if bytes(there.bytes()) == content:
                    self._version = there.meta
                    return True
            return False
        return True

    def _renew(self) -> None:
        while not self._ended.wait(LEASE_SECONDS / RENEWALS):
            with suppress(BaseError):  # the network may come back before another process takes the lease over
                if not self._put(self._version):
                    self.place.taken_over = True
                    return

    def release(self) -> None:
        """Never raises: an object that cannot be deleted now is taken over after a while."""
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
