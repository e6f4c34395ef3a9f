"""A claim in an object store, which has no locks: an object that its holder rewrites regularly.

A process that sees no rewrite for LEASE_SECONDS takes the lease over, by a PUT on the condition that the object has not changed.
Clocks of different machines are never compared. The former holder notices at its next renewal, which `confirm` makes at once where
the last one is old: after a lost connection, or when the process was stopped.
"""

import asyncio
import json
import logging
import os
import secrets
import socket
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from typing import Any, Protocol

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError

from minicache.cache.manifest import now
from minicache.errors import StoreError
from minicache.objects import RETRIES, put_instead, received, wait_for

log = logging.getLogger(__name__)

# The holder may lose the network for so long; others wait for so long after a kill.
LEASE_SECONDS = 60.0
# Renewals in that time.
RENEWALS = 6
# Seconds at the end: a store that does not answer then keeps nobody.
PARTING_SECONDS = 10.0
# Times to put the object again after one's own PUT, whose answer was lost.
ATTEMPTS = 3
MOST_BYTES = 2**16


class Leased(Protocol):
    """The parts of a place that a lease needs.

    url: what it is called. objects: the object store. claims: the same with short timeouts. leases: those that this process
    holds or follows, or has lost.
    """

    url: str
    objects: Any
    claims: Any
    leases: "set[Lease | Followed]"

    def in_one_line(self) -> AbstractContextManager[None]:
        """Turn the library's exceptions into a `StoreError`."""


class Lease:
    """An object in a bucket and this process's hold on it. A shared hold needs no object: it only excludes a hold alone.

    is_lost: whether another process has taken it over, because it saw no renewal for a while.
    """

    is_safe = True

    def __init__(self, place: Leased, name: str) -> None:
        self.place, self.name, self.is_alive, self.is_lost = place, name, False, False
        # The e-tag of another holder's object, and the time since which it has not changed.
        self._seen: tuple[str | None, float] | None = None
        # The version of our object as it is stored now, and the time before which it was stored.
        self._version: Mapping[str, Any] | None = None
        self._renewed = 0.0
        self._renewing: asyncio.Task[None] | None = None
        # id: by which the object tells its holder
        self.id, self._count = secrets.token_hex(8), 0
        self._lock = asyncio.Lock()

    def take(self, alone: bool) -> bool:
        """As `Claim.take`. Raises StoreError: the object store cannot be reached, or refuses."""
        with self.place.in_one_line():
            return wait_for(self.place.url, lambda: self._take(alone))

    def release(self) -> None:
        """Give the lease up. Never raises: others take over an object that cannot be deleted now."""
        with suppress(StoreError, TimeoutError), self.place.in_one_line():
            wait_for(self.place.url, self._give_up, PARTING_SECONDS)

    def remove(self) -> None:
        self.release()

    async def confirm(self, is_doubtful: bool = False) -> None:
        """Renew the lease if its last renewal is old, or with `is_doubtful`, so that `is_lost` is as the object store has it.

        Raises:
            BaseError: the object store cannot be reached, or refuses.
        """
        async with self._lock:
            if is_doubtful or time.monotonic() - self._renewed > LEASE_SECONDS / 2:
                await self._renew(self.place.objects)

    async def _take(self, alone: bool) -> bool:
        if not alone and self._renewing is None and await self._found() is None:
            return True
        if (self._renewing is None or self.is_lost) and not await self._acquire():
            return False
        if not alone:
            await self._give_up()
        return True

    async def _acquire(self) -> bool:
        await self._give_up()
        found = await self._found()
        if found is not None and not self._is_abandoned(found["e_tag"]):
            return False
        if not await self._put(self.place.objects, found):
            return False
        log.debug("%s: %s", self.name, "held" if found is None else "taken over, not renewed for a while")
        self.is_lost = False
        self.place.leases.add(self)
        self._renewing = asyncio.get_running_loop().create_task(self._keep())
        return True

    async def _found(self) -> Mapping[str, Any] | None:
        """What is known of the object; None if there is none."""
        with suppress(FileNotFoundError):
            return await obstore.head_async(self.place.objects, self.name)
        return None

    def _is_abandoned(self, e_tag: str | None) -> bool:
        if self._seen is None or self._seen[0] != e_tag:
            self.is_alive = self._seen is not None
            log.debug("%s: another process holds it%s", self.name, ", and renews it" if self.is_alive else "")
            self._seen = e_tag, time.monotonic()
        return time.monotonic() - self._seen[1] >= LEASE_SECONDS

    async def _put(self, store: Any, found: Mapping[str, Any] | None) -> bool:
        """Replace the object `found` (None: create it); returns whether no other process had changed it meanwhile."""
        self._count += 1
        begun, host, pid = time.monotonic(), socket.gethostname(), os.getpid()
        content = json.dumps({"host": host, "pid": pid, "written": now(), "count": self._count, "id": self.id}).encode()
        # A renewal that finds no answer is left to the next one.
        patience = 0 if store is self.place.claims else RETRIES["retry_timeout"].total_seconds()
        for _ in range(ATTEMPTS):
            try:
                self._version = await put_instead(store, self.name, content, found, patience)
            except FileNotFoundError:
                # Creating an object fails so only if the bucket is missing.
                if found is None:
                    raise
                return False
            except (AlreadyExistsError, PreconditionError):
                found = await self._own(store)
                if found is None:
                    return False
            else:
                self._renewed = begun
                return True
        return False

    async def _own(self, store: Any) -> Mapping[str, Any] | None:
        """The object as an earlier PUT of this process has stored it, whose answer was lost; None if it is another's, or gone."""
        there, holder = await _holder(store, self.name)
        return there if holder == self.id else None

    async def _keep(self) -> None:
        while not self.is_lost:
            await asyncio.sleep(LEASE_SECONDS / RENEWALS)
            # The network may come back before another process takes the lease over.
            with suppress(BaseError):
                async with self._lock:
                    await self._renew(self.place.claims)

    async def _renew(self, store: Any) -> None:
        self.is_lost = self.is_lost or not await self._put(store, self._version)
        if self.is_lost:
            log.debug("%s: another process has taken it over", self.name)

    async def _give_up(self) -> None:
        """Stop renewing and delete the object, if it is ours."""
        if self._renewing is None:
            return
        self._renewing.cancel()
        self._renewing = None
        with suppress(BaseError, FileNotFoundError):
            async with self._lock:
                if time.monotonic() - self._renewed > LEASE_SECONDS / 2:
                    await self._renew(self.place.claims)
            if not self.is_lost:
                await obstore.delete_async(self.place.claims, self.name)
        self.place.leases.discard(self)


class Followed:
    """The lease of another process, under which this one writes too: rank 0's, for the other ranks of its run.

    is_lost: whether the object is no longer that process's.
    """

    def __init__(self, place: Leased, name: str, id: str) -> None:
        self.place, self.name, self.id, self.is_lost = place, name, id, False
        self._seen = time.monotonic()

    async def confirm(self, is_doubtful: bool = False) -> None:
        """Look at the object if that was long ago, or with `is_doubtful`. Raises as `Lease.confirm`."""
        if is_doubtful or time.monotonic() - self._seen > LEASE_SECONDS / 2:
            begun = time.monotonic()
            self.is_lost = self.is_lost or (await _holder(self.place.objects, self.name))[1] != self.id
            self._seen = begun


async def _holder(store: Any, name: str) -> tuple[Mapping[str, Any] | None, str | None]:
    """What is known of the object of a lease, and the id of its holder; None where there is none."""
    with suppress(FileNotFoundError):
        there = await obstore.get_async(store, name)
        with suppress(ValueError, RecursionError):
            content = json.loads(await received(there, MOST_BYTES))
            if isinstance(content, dict) and isinstance(content.get("id"), str):
                return there.meta, content["id"]
        return there.meta, None
    return None, None
