"""A claim in an object store, which has no locks: an object that its holder rewrites regularly.

A process that sees no rewrite for LEASE_SECONDS takes the lease over, by a PUT on the condition that the object has not changed.
Clocks of different machines are never compared. The former holder notices at its next renewal and stops writing.
"""

import json
import logging
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

log = logging.getLogger(__name__)

# The holder may lose the network for so long; others wait for so long after a kill.
LEASE_SECONDS = 60.0
# Renewals in that time.
RENEWALS = 6


class Leased(Protocol):
    """The parts of a place that a lease needs.

    claims: the object store with short timeouts. taken_over: set when another run is found to hold the lease.
    """

    claims: Any
    taken_over: bool

    def in_one_line(self) -> AbstractContextManager[None]:
        """Turn the library's exceptions into a `StoreError`."""

    def has(self, name: str) -> bool:
        """Whether there is an object of this name."""


class Lease:
    """An object in a bucket and this process's hold on it. A shared hold needs no object: it only excludes a hold alone."""

    is_safe = True

    def __init__(self, place: Leased, name: str) -> None:
        self.place, self.name, self.is_alive = place, name, False
        # The e-tag of another holder's object, and the time since which it has not changed.
        self._seen: tuple[str | None, float] | None = None
        # The version of our object as it is stored now.
        self._version: Mapping[str, Any] | None = None
        self._ended = threading.Event()
        self._renewing: threading.Thread | None = None
        self._id, self._count = secrets.token_hex(8), 0

    def take(self, alone: bool) -> bool:
        """As `Claim.take`. Raises StoreError: the object store cannot be reached, or refuses."""
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
        log.debug("%s: %s", self.name, "held" if found is None else "taken over, not renewed for a while")
        self.place.taken_over = False
        self._ended.clear()
        self._renewing = threading.Thread(target=self._renew, daemon=True)
        self._renewing.start()
        return True

    def _is_abandoned(self, e_tag: str | None) -> bool:
        if self._seen is None or self._seen[0] != e_tag:
            self.is_alive = self._seen is not None
            log.debug("%s: another process holds it%s", self.name, ", and renews it" if self.is_alive else "")
            self._seen = e_tag, time.monotonic()
        return time.monotonic() - self._seen[1] >= LEASE_SECONDS

    def _put(self, found: Mapping[str, Any] | None) -> bool:
        """Replace the object `found` (None: create it); returns whether it had not changed meanwhile."""
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
            # Creating an object fails so only if the bucket is missing.
            if found is None:
                raise
            return False
        except (AlreadyExistsError, PreconditionError):
            # A PUT that the library repeated, because the response was lost, finds its own object.
            with suppress(FileNotFoundError):
                there = obstore.get(self.place.claims, self.name)
                if bytes(there.bytes()) == content:
                    self._version = there.meta
                    return True
            return False
        return True

    def _renew(self) -> None:
        while not self._ended.wait(LEASE_SECONDS / RENEWALS):
            # The network may come back before another process takes the lease over.
            with suppress(BaseError):
                if not self._put(self._version):
                    self.place.taken_over = True
                    return

    def release(self) -> None:
        """Give the lease up. Never raises: others take over an object that cannot be deleted now."""
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
