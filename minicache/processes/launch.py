"""`--nproc N`: the same run as `torchrun --nproc-per-node N -m minicache …`, with one message where torchrun prints a traceback."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from minicache.errors import ProcessLost

Child = subprocess.Popen[bytes]
STOPS = (signal.SIGINT, signal.SIGTERM)


def launch(processes: int, arguments: list[str]) -> int:
    """Run `python -m minicache ARGUMENTS` in several processes, as torchrun does; the first failure ends all of them.

    Returns:
        The exit code: 0 if every process ended well, else that of the first that failed.

    Raises:
        ProcessLost: one was killed from outside, so it could not print why.
    """
    children = _start(processes, arguments)
    with _passing_on_signals(children) as asked:
        try:
            _wait(children, asked)
            return _exit_code(children, bool(asked))
        finally:
            _end(children)


def _start(processes: int, arguments: list[str]) -> list[Child]:
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // processes))
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "LOCAL_WORLD_SIZE": str(processes),
        "WORLD_SIZE": str(processes),
        "OMP_NUM_THREADS": threads,
    }
    return [
        subprocess.Popen(
            [sys.executable, "-m", "minicache", *arguments],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(processes)
    ]


@contextmanager
def _passing_on_signals(children: list[Child]) -> Iterator[list[int]]:
    """Send requests to stop on to the children within the block. Yields the list of requests so far."""
    asked: list[int] = []

    def pass_on(kind: int, frame: object) -> None:
        asked.append(kind)
        for child in children:
            child.send_signal(kind)

    before = {kind: signal.signal(kind, pass_on) for kind in STOPS}
    try:
        yield asked
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def _wait(children: list[Child], asked: list[int]) -> None:
    """Wait until all have ended or one has failed. After a request to stop, each may take its time to save."""
    while any(child.poll() is None for child in children):
        if not asked and any(child.poll() for child in children):
            return
        time.sleep(0.1)


def _exit_code(children: list[Child], is_asked: bool) -> int:
    """The exit code of the run. Raises as `launch`."""
    failed = next((rank for rank, child in enumerate(children) if child.returncode), None)
    if is_asked or failed is None:
        return 130 if is_asked else 0
    if (code := children[failed].returncode) > 0:
        return code
    raise ProcessLost(
        f"process {failed} of {len(children)} was killed ({signal.Signals(-code).name}; SIGKILL is often a lack of memory); "
        "what was saved stays, and the same command goes on with it (train: with --resume)"
    )


def free_port() -> int:
    """A TCP port that nothing listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _end(children: list[Child]) -> None:
    """End those that still run: 10 seconds after SIGTERM, with SIGKILL."""
    deadline = time.monotonic() + 10
    for child in children:
        if child.poll() is None:
            child.send_signal(signal.SIGTERM)
    for child in children:
        try:
            child.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
