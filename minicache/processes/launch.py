"""`--nproc N`: the same run as `torchrun --nproc-per-node N -m minicache …`, but with one message instead of a traceback."""

import logging
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

from minicache.errors import ProcessLost
from minicache.interpreter import python_command, python_environment
from minicache.machine import cores
from minicache.processes.signals import INTERRUPTED, StopFlag

log = logging.getLogger(__name__)

Child = subprocess.Popen[bytes]
# The variables by which a rank finds the others, and the files that it must inherit.
Place = tuple[dict[str, str], tuple[int, ...]]
# The variable with the number of the socket that rank 0 inherits, to listen on.
LISTENING = "MINICACHE_LISTENING"
# Seconds for the others to leave in, once one has left after a request to stop.
TOGETHER = 3.0


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
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, cores() // processes))
    command = [*python_command(), "-m", "minicache", *arguments]
    with meeting(processes) as ranks:
        for environment, inherited in ranks:
            given = {**python_environment(), "OMP_NUM_THREADS": threads, **environment}
            children.append(subprocess.Popen(command, env=given, pass_fds=inherited))
    log.debug("started %d processes, %s threads each: %s", processes, threads, [child.pid for child in children])


@contextmanager
def meeting(processes: int, per_node: int | None = None) -> Iterator[list[Place]]:
    """What each rank of a new world on this machine must be started with.

    The port is never free between its choice and its use: the socket is bound and listens within this context, and rank 0 inherits
    it. Windows cannot hand it on: there the port is free for a moment.

    per_node: the number of processes that are told to share a machine; None: all.
    """
    with socket.create_server(("127.0.0.1", 0)) as listening:
        local, port = per_node or processes, listening.getsockname()[1]
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_WORLD_SIZE": local, "WORLD_SIZE": processes}
        if hands_on := os.name != "nt":
            shared[LISTENING] = listening.fileno()
        else:
            listening.close()
        ranks: list[Place] = []
        for rank in range(processes):
            own = {**shared, "RANK": rank, "LOCAL_RANK": rank % local}
            inherited = (listening.fileno(),) if hands_on and rank == 0 else ()
            ranks.append(({name: str(value) for name, value in own.items()}, inherited))
        yield ranks


def _wait(children: list[Child], asked: StopFlag) -> int:
    """Wait for the children; returns the exit code of the run.

    Once asked to stop, they may take their time to save. They leave together: one that is there for long after another has left
    waits in vain, or is stopped.
    """
    alone_since = None
    while any(child.poll() is None for child in children):
        time.sleep(0.1)
        if not asked and any(child.poll() for child in children):
            break
        if asked and any(child.poll() is not None for child in children):
            alone_since = alone_since or time.monotonic()
            if time.monotonic() - alone_since > TOGETHER:
                break
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
            child.wait()
