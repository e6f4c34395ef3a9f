"""`--nproc N`: the same run as `torchrun --nproc-per-node N -m minicache …`, with one message where torchrun prints a traceback."""

import os
import signal
import socket
import subprocess
import sys
import time

from minicache.errors import ProcessLost
from minicache.processes.signals import INTERRUPTED, StopFlag


class PassOn(StopFlag):
    """Within this context every request to stop goes to the children, which save and end."""

    def __init__(self, children: list[subprocess.Popen[bytes]]) -> None:
        super().__init__()
        self.children = children

    def request(self, kind: int) -> None:
        for child in self.children:
            child.send_signal(kind)

    insist = request


def launch(processes: int, arguments: list[str]) -> int:
    """Run `python -m minicache ARGUMENTS` in `processes` processes, as torchrun would; the first failure ends all.

    Returns:
        The exit code: 0 if every process ended well, else that of the first that failed.

    Raises:
        ProcessLost: one was killed from outside, which it could not say itself.
    """
    children: list[subprocess.Popen[bytes]] = []
    with PassOn(children) as asked:
        try:
            _start(children, processes, arguments)
            if asked:
                # some were started after the request
                asked.request(signal.SIGTERM)
            return _wait(children, asked)
        finally:
            _end(children)


def _start(children: list[subprocess.Popen[bytes]], processes: int, arguments: list[str]) -> None:
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // processes))
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "LOCAL_WORLD_SIZE": str(processes),
        "WORLD_SIZE": str(processes),
        "OMP_NUM_THREADS": threads,
    }
    for rank in range(processes):
        environment = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        children.append(subprocess.Popen([sys.executable, "-m", "minicache", *arguments], env=environment))


def _wait(children: list[subprocess.Popen[bytes]], asked: StopFlag) -> int:
    """The exit code of all. Once asked to stop, each may take its time to save."""
    while any(child.poll() is None for child in children) and (asked or not any(child.poll() for child in children)):
        time.sleep(0.1)
    failed = next((rank for rank, child in enumerate(children) if child.returncode), None)
    if asked or failed is None:
        return INTERRUPTED if asked else 0
    if (code := children[failed].returncode) > 0:
        return code
    raise ProcessLost(
        f"process {failed} of {len(children)} was killed ({signal.Signals(-code).name}; SIGKILL is often a lack of memory); "
        "what was saved stays, and the same command goes on with it (train: with --resume)"
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _end(children: list[subprocess.Popen[bytes]]) -> None:
    deadline = time.monotonic() + 10
    for child in children:
        if child.poll() is None:
            child.send_signal(signal.SIGTERM)
    for child in children:
        try:
            child.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
