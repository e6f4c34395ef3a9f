"""SIGINT and SIGTERM: heard once, however many copies of one request a terminal, a launcher and a scheduler send."""

import atexit
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from typing import Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)
ONE_REQUEST = 1.0  # seconds within which signals are copies of the first
INTERRUPTED = 130  # exit code


class Interruptible:
    """Within this context a first SIGINT or SIGTERM raises KeyboardInterrupt, and copies of it do no more.

    One that the process was told to ignore (a shell's background job and SIGINT) stays ignored. Contexts lie within each other:
    what an inner one has heard, the one around it has heard too.
    """

    def __init__(self) -> None:
        self.since: float | None = None
        self._around: Interruptible | None = None

    def __enter__(self) -> Self:
        self.before = {kind: signal.getsignal(kind) for kind in SIGNALS}
        self._hook = sys.unraisablehook
        owners = [getattr(handler, "__self__", None) for handler in self.before.values()]
        self._around = next((owner for owner in owners if isinstance(owner, Interruptible)), None)
        for kind, handler in self.before.items():
            if handler != signal.SIG_IGN:
                signal.signal(kind, self._hear)
        sys.unraisablehook = self._ask_again
        return self

    def __exit__(self, *error: object) -> None:
        sys.unraisablehook = self._hook
        if self._around:
            self._around.since = self._around.since or self.since
        for kind, handler in self.before.items():
            signal.signal(kind, handler)

    def _hear(self, kind: int, frame: object) -> None:
        first, now = self.since is None, time.monotonic()
        self.since, self._kind = self.since or now, kind
        if first:
            self.request(kind)
        elif now - self.since > ONE_REQUEST:
            self.insist(kind)

    def _ask_again(self, unraisable: "sys.UnraisableHookArgs") -> None:
        """A signal that came within a destructor or a weak reference's callback: Python drops what is raised there."""
        if unraisable.exc_type is KeyboardInterrupt and self.since is not None:
            self.since = None
            # later, from beside: raised in here it would be dropped too
            again = threading.Timer(0.01, os.kill, (os.getpid(), self._kind))
            again.daemon = True
            again.start()
        else:
            self._hook(unraisable)

    def request(self, kind: int) -> None:
        raise KeyboardInterrupt

    def insist(self, kind: int) -> None:
        """Another request, later than any copy of the first."""
        raise KeyboardInterrupt


class StopFlag(Interruptible):
    """Within this context a first signal only sets the flag: what is under way is finished and saved. A later one raises."""

    def request(self, kind: int) -> None:
        pass

    def __bool__(self) -> bool:
        return self.since is not None


class CommandLine(Interruptible):
    """From here to the end of the process, around every other context: no signal gives a traceback.

    What comes here finds nothing to save, because no work has begun or all has ended: copies of a request that was heard
    within do nothing, and another one ends the process at once.
    """

    def __enter__(self) -> Self:
        super().__enter__()
        # Python's own handlers are gone in its last moments, when a signal would kill
        atexit.register(ignore_signals)
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def request(self, kind: int) -> None:
        with suppress(RuntimeError, OSError, ValueError):
            sys.stdout.flush()
        os._exit(INTERRUPTED)

    insist = request


def ignore_signals() -> None:
    for kind in SIGNALS:
        signal.signal(kind, signal.SIG_IGN)
