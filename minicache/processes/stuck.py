"""Ends a process that was asked to stop, and stands in a collective in which the others do not come.

Python runs a signal's handler in the main thread, between two instructions. Within a collective there are none, so that no handler
ends a process whose peer is gone, asleep or in another collective. A thread ends it, if all of these hold:

- a signal to stop has come. C code writes its number to a socket at once, whatever the main thread does;
- the main thread is in a section that `inside` marks, in which it does nothing but wait for others or take a step with them;
- since the signal, it has stood there for `limit` seconds. Each collective that ends begins the time anew, and `learn` raises the
  limit to a multiple of what steps take here: a slow step is no standstill;
- it does not save. While one rank writes a checkpoint the others wait for it, rightly for hours: `saving` marks that.

So it never ends a process that would still come to save its state: that one leaves the section, or saves. What is lost is what a
kill at that instant costs. Asked again, later than any copy of the first signal, a process gets ten seconds, wherever it is.
"""

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from minicache.processes.signals import INTERRUPTED, ONE_REQUEST, SIGNALS

# Seconds in a collective, once asked to stop; seconds to leave in, once asked again.
LIMIT, AGAIN = 12.0, 10.0
# Of the time that steps take.
MARGIN = 3.0


class Watch:
    """Watches the main thread of one of several processes, from `start` on. Before, and alone, its marks do nothing."""

    def __init__(self) -> None:
        self.limit = LIMIT
        self._since: float | None = None
        self._is_saving = False

    def start(self, name: str) -> None:
        """Watch this process, which the line at its end calls `name`. Only the main thread may call this."""
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(ours, theirs, name), name="watch", daemon=True).start()

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Mark a block that waits for other processes, or takes a step with them."""
        around, self._since = self._since, time.monotonic()
        try:
            yield
        finally:
            # the end of an inner wait is a sign of life
            self._since = None if around is None else time.monotonic()

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Mark a block that saves, or waits for others that do."""
        around, self._is_saving = self._is_saving, True
        try:
            yield
        finally:
            self._is_saving = around
            if self._since is not None:
                self._since = time.monotonic()

    def learn(self, seconds: float) -> None:
        """Note that a block of `inside` may well take so long."""
        self.limit = max(self.limit, MARGIN * seconds)

    def _watch(self, signals: socket.socket, kept: socket.socket, name: str) -> None:
        """kept: the other end, which must not be collected."""
        asked = again = None
        while True:
            signals.settimeout(None if asked is None else 0.25)
            with suppress(TimeoutError):
                came, now = signals.recv(64), time.monotonic()
                if any(kind in came for kind in SIGNALS):
                    again = again or (now if asked is not None and now - asked > ONE_REQUEST else None)
                    asked = asked or now
            if asked is not None and self._is_over(asked, again):
                _end(
                    f"interrupted; {name} waited for others that do not come, and ends without saving; what was saved stays"
                )

    def _is_over(self, asked: float, again: float | None) -> bool:
        now, since = time.monotonic(), self._since
        if again is not None and now - again > AGAIN:
            return True
        return since is not None and not self._is_saving and now - max(since, asked) > self.limit


def _end(line: str) -> None:
    with suppress(OSError):
        os.write(2, f"{line}\n".encode())
    os._exit(INTERRUPTED)
