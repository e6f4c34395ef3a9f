"""SIGINT and SIGTERM: heard once, however many copies of one request a terminal, a launcher and a scheduler send."""

import signal
import time

ONE_REQUEST = 1.0  # seconds within which signals are copies of the first


class Interruptible:
    """Within this context a first SIGINT or SIGTERM raises KeyboardInterrupt, and copies of it do no more.

    One that the process was told to ignore (a shell's background job and SIGINT) stays ignored.
    """

    def __init__(self) -> None:
        self.since: float | None = None

    def __enter__(self) -> "Interruptible":
        self.before = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)}
        for kind, handler in self.before.items():
            if handler != signal.SIG_IGN:
                signal.signal(kind, self._hear)
        return self

    def __exit__(self, *error: object) -> None:
        for kind, handler in self.before.items():
            signal.signal(kind, handler)

    def _hear(self, *kind_and_frame: object) -> None:
        first, now = self.since is None, time.monotonic()
        self.since = self.since or now
        if first:
            self.request()
        elif now - self.since > ONE_REQUEST:
            raise KeyboardInterrupt

    def request(self) -> None:
        raise KeyboardInterrupt


class StopFlag(Interruptible):
    """Within this context a first signal only sets the flag: what is under way is finished and saved. A later one raises."""

    def request(self) -> None:
        pass

    def __bool__(self) -> bool:
        return self.since is not None
