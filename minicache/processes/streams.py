"""stdout and stderr that cannot end the work of a process: what they refuse is dropped.

A reader of the pipe that is gone (`| head`; `| tee log`, which Ctrl-C ends too), a full disk below a log, a terminal that was
closed: a training goes on, and saves. Whether stdout refused something is known at the end.
"""

import errno
import io
import os
import sys
from types import TracebackType
from typing import IO, Any, Self

# Nobody is there to read any more, which is no failure: it has read what it wanted.
GONE = (errno.EPIPE, errno.ESHUTDOWN, errno.ECONNRESET)


class Outlet(io.RawIOBase):
    """The end of a stream at the system. problem: the first error of a write, None so far."""

    problem: OSError | None = None

    def __init__(self, raw: Any, stream: object) -> None:
        """stream: the one that raw belongs to, which closes it when nobody keeps it."""
        self._raw, self._stream = raw, stream

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return int(self._raw.fileno())

    def isatty(self) -> bool:
        return bool(self._raw.isatty())

    def write(self, data: Any) -> int | None:
        """Write what the system takes of it, or drop all of it. A disk may have room again at the next call."""
        try:
            written: int | None = self._raw.write(data)
        except OSError as error:
            self.problem = self.problem or error
            return memoryview(data).nbytes
        return written


class Outlets:
    """Within this context stdout and stderr are such streams; those that the process was started without lead nowhere.

    Raises:
        SystemExit: at the end, with 1 in place of 0: stdout refused a part of the report, though somebody may read it.
    """

    def __init__(self, show: Any) -> None:
        """show: prints a line on an error to stderr."""
        self._show = show
        self._outlets: dict[str, Outlet] = {}

    def __enter__(self) -> Self:
        _open_missing()
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if stream is None:
                setattr(sys, name, open(os.devnull, "w", encoding="utf-8", newline="\n"))  # noqa: PTH123
            elif isinstance(stream, io.TextIOWrapper):
                setattr(sys, name, self._behind(name, stream))
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        problem = self._outlets["stdout"].problem if "stdout" in self._outlets else None
        succeeded = error is None or (isinstance(error, SystemExit) and not error.code)
        if succeeded and problem and problem.errno not in GONE:
            self._show(
                f"standard output: cannot be written: {problem.strerror}; the work is done, and what it printed is not whole"
            )
            raise SystemExit(1)

    def _behind(self, name: str, stream: io.TextIOWrapper) -> IO[str]:
        """A stream that writes as this one does, through an outlet."""
        raw = getattr(stream.buffer, "raw", stream.buffer)
        if isinstance(raw, Outlet):
            # of an earlier command of this process
            self._outlets[name], raw.problem = raw, None
            return stream
        stream.flush()
        self._outlets[name] = outlet = Outlet(raw, stream)
        # as of `python -u`, which has no buffer
        plain = isinstance(stream.buffer, io.RawIOBase)
        buffer: Any = outlet if plain else io.BufferedWriter(outlet)
        return io.TextIOWrapper(
            buffer,
            encoding=stream.encoding,
            errors=stream.errors,
            newline=None,
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )


def _open_missing() -> None:
    """Open the descriptors 0 to 2 that the process was started without (`>&-`).

    Else the next file gets such a number, and what C libraries and child processes say is written into it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            os.dup2(opened, number)
            if opened != number:
                os.close(opened)
