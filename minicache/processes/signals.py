"""Handling of SIGINT and SIGTERM: one request to stop acts once, although terminal, launcher and scheduler may each send a copy."""

import atexit
import math
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from functools import cache
from typing import Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Seconds after a first signal in which others are copies of it.
ONE_REQUEST = 1.0
# The exit code.
INTERRUPTED = 130
# Seconds in which the main thread hears a signal, unless it waits.
HEARD_WITHIN = 0.2
# Signal -> when the main thread heard it last.
_heard: dict[int, float] = {}


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
        _heard[kind] = now
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
        if os.name != "nt" and threading.current_thread() is threading.main_thread():
            _wake_for_signals()
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


@cache
def _wake_for_signals() -> None:
    """From here on a thread sees to it that the main thread hears a signal while it waits for a lock.

    Python looks for signals before it waits, and a signal ends the waiting; one that comes in between is heard only when the lock
    comes: after the minutes for which a silent object store is asked, or never.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    # a process that is forked has no such thread, and its signals are not this one's
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
    threading.Thread(target=_nudge, args=(reader,), name="signals", daemon=True).start()


def _nudge(reader: int) -> None:
    """Send the main thread each signal again that it did not hear. reader: gets a byte as a signal comes."""
    since = time.monotonic()
    while kinds := os.read(reader, 64):
        time.sleep(HEARD_WITHIN)
        missed = [kind for kind in SIGNALS if kind in kinds and _heard.get(kind, -math.inf) < since]
        since = time.monotonic()
        for kind in missed:
            if isinstance(getattr(signal.getsignal(kind), "__self__", None), Interruptible):
                signal.pthread_kill(threading.main_thread().ident or 0, kind)


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
