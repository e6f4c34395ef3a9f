"""Handling of SIGINT and SIGTERM: one request to stop acts once, although terminal, launcher and scheduler may each send a copy."""

import atexit
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from typing import Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Seconds after a first signal in which others are copies of it.
ONE_REQUEST = 1.0
# The exit code.
INTERRUPTED = 130


class Interruptible:
    """Within this context a first SIGINT or SIGTERM raises KeyboardInterrupt; copies of it are ignored.

    A signal that the process ignored before stays ignored, such as SIGINT in a shell's background job. Contexts can be nested: a
    signal that an inner context received counts as received in the outer one too.
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
                signal.signal(kind, self._receive)
        sys.unraisablehook = self._repeat
        return self

    def __exit__(self, *error: object) -> None:
        sys.unraisablehook = self._hook
        if self._around:
            self._around.since = self._around.since or self.since
        for kind, handler in self.before.items():
            signal.signal(kind, handler)

    def _receive(self, kind: int, frame: object) -> None:
        first, now = self.since is None, time.monotonic()
        self.since, self._kind = self.since or now, kind
        if first:
            self.request(kind)
        elif now - self.since > ONE_REQUEST:
            self.insist(kind)

    def _repeat(self, unraisable: "sys.UnraisableHookArgs") -> None:
        """Send a signal again that came within a destructor or a callback of a weak reference, where Python drops exceptions."""
        if unraisable.exc_type is KeyboardInterrupt and self.since is not None:
            self.since = None
            # From a timer: an exception that is raised in this hook is dropped too.
            again = threading.Timer(0.01, _send_again, (self._kind,))
            again.daemon = True
            again.start()
        else:
            self._hook(unraisable)

    def request(self, kind: int) -> None:
        """Act on the first signal."""
        raise KeyboardInterrupt

    def insist(self, kind: int) -> None:
        """Act on another request, which came later than any copy of the first."""
        raise KeyboardInterrupt


class StopFlag(Interruptible):
    """Within this context a first signal only sets the flag, so that a step can be finished and saved. A later one raises."""

    def request(self, kind: int) -> None:
        pass

    def __bool__(self) -> bool:
        return self.since is not None


class Postponed(StopFlag):
    """Within this context a request waits for the end of the block: an import that it broke off could not be repeated."""

    def insist(self, kind: int) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        if self and error[0] is None:
            raise KeyboardInterrupt


class CommandLine(Interruptible):
    """From here to the end of the process, around every other context, no signal causes a traceback.

    A signal that arrives here finds nothing to save, because no work has begun or all has ended. Copies of a request that an inner
    context received do nothing; another one ends the process at once.
    """

    def __enter__(self) -> Self:
        super().__enter__()
        # Python restores the default handlers at its end, when a signal would kill the process.
        atexit.register(ignore_signals)
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def request(self, kind: int) -> None:
        with suppress(RuntimeError, OSError, ValueError):
            sys.stdout.flush()
        os._exit(INTERRUPTED)

    insist = request


def _send_again(kind: int) -> None:
    """Send this process a signal. On Windows `os.kill` would end it at once."""
    if os.name == "nt":
        signal.raise_signal(kind)
    else:
        os.kill(os.getpid(), kind)


def ignore_signals() -> None:
    """Ignore SIGINT and SIGTERM from now on."""
    for kind in SIGNALS:
        signal.signal(kind, signal.SIG_IGN)
