"""`--nproc N`: the same run as `torchrun --nproc-per-node N -m minicache …`, but with one message instead of a traceback."""

import logging
import os
import signal
import socket
import subprocess
import sys
import time

from minicache.errors import ProcessLost
from minicache.processes.signals import INTERRUPTED, StopFlag

log = logging.getLogger(__name__)

Child = subprocess.Popen[bytes]


class PassOn(StopFlag):
    """Within this context every request to stop is passed on to the children, which save and end."""

    def __init__(self, children: list[Child]) -> None:
        super().__init__()
        self.children = children

    def request(self, kind: int) -> None:
        if os.name == "nt":
            # A console sends Ctrl-C to all of its processes; another signal would end them before they save.
            return
        for child in self.children:
            child.send_signal(kind)

    insist = request


def launch(processes: int, arguments: list[str]) -> int:
    """Run `python -m minicache ARGUMENTS` in `processes` processes, as torchrun would; the first failure ends all of them.

    Returns:
        The exit code: 0 if every process succeeded, else that of the first one that failed.

    Raises:
        ProcessLost: a process was killed from outside, so that it could not report an error itself.
    """
    children: list[Child] = []
    with PassOn(children) as asked:
        try:
            _start(children, processes, arguments)
            if asked:
                # Some children were started after the request.
                asked.request(signal.SIGTERM)
            return _wait(children, asked)
        finally:
            _end(children)


def _start(children: list[Child], processes: int, arguments: list[str]) -> None:
    """Start the processes and append them to `children`."""
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // processes))
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "LOCAL_WORLD_SIZE": str(processes),
        "WORLD_SIZE": str(processes),
        "MINIDPO_NPROC": str(processes),
        "OMP_NUM_THREADS": threads,
    }
    for rank in range(processes):
        environment = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        children.append(subprocess.Popen([sys.executable, "-m", "minicache", *arguments], env=environment))
    log.debug("started %d processes, %s threads each: %s", processes, threads, [child.pid for child in children])


def _wait(children: list[Child], asked: StopFlag) -> int:
    """Wait for the children; returns the exit code of the run. Once asked to stop, each may take its time to save."""
    while any(child.poll() is None for child in children) and (asked or not any(child.poll() for child in children)):
        time.sleep(0.1)
    log.debug("exit codes: %s", [child.returncode for child in children])
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
    """A TCP port that no process of this machine listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _end(children: list[Child]) -> None:
    """End all children: by SIGTERM, and after ten seconds by SIGKILL."""
    deadline = time.monotonic() + 10
    for child in children:
        if child.poll() is None:
            child.send_signal(signal.SIGTERM)
    for child in children:
        try:
            child.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
