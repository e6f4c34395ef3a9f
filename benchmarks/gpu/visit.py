"""Runs checks one after another in a process of their own, replaced when a check fails, dies or takes too long. No torch."""

import os
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from multiprocessing import get_context
from typing import Any

from benchmarks.gpu.catalog import Check
from benchmarks.gpu.figures import Figure, Machine, NeedsGpu, forget_graphs, release
from minicache.commands.running import _let_segments_grow
from minicache.text import one_line

OK, MISSED, FAILED, NO_GPU, CUT_OFF, NOT_RUN = "OK", "MISSED", "FAILED", "needs a GPU", "CUT OFF", "not run"
# Seconds for a process to start.
START = 90.0
# On a CPU, which may be slow and busy, the limits of time are so many times as long.
PATIENCE = 5


@dataclass
class Outcome:
    """A check's result. message: why it is not OK, if its figures do not say so."""

    name: str
    status: str = ""
    message: str = ""
    figures: list[Figure] = field(default_factory=list)
    seconds: float = 0.0


def visit(
    checks: Mapping[str, Check], tiny: bool, minutes: float, done: Callable[[list[Outcome]], None]
) -> list[Outcome]:
    """The outcomes of all checks. minutes: for all of them. done: called after every check with the outcomes so far."""
    deadline, found, worker = time.monotonic() + 60 * minutes, [], Worker(tiny)
    try:
        for name, check in checks.items():
            left, limit = deadline - time.monotonic(), check.seconds * (PATIENCE if tiny else 1)
            if left < limit / 3:
                found.append(
                    Outcome(name, NOT_RUN, f"no time: {max(left, 0):.0f} s are left, and it may take {limit:.0f} s")
                )
            else:
                found.append(worker.run(name, check.code, min(limit, left)))
            done(found)
    finally:
        worker.end()
    return found


class Worker:
    """The process that runs checks; `run` starts it where there is none."""

    def __init__(self, tiny: bool) -> None:
        self.tiny = tiny
        self.process: Any = None
        self.connection: Any = None

    def run(self, name: str, code: str, seconds: float) -> Outcome:
        """Run a check, for at most so many seconds."""
        outcome, started = Outcome(name), time.monotonic()
        deadline = started + seconds
        try:
            self._start(deadline)
            self.connection.send(code)
            while isinstance(heard := self._hear(deadline), Figure):
                outcome.figures.append(heard)
            outcome.status, outcome.message = heard
        except TimeoutError:
            outcome.status, outcome.message = CUT_OFF, f"after {time.monotonic() - started:.0f} s"
        except (EOFError, OSError):
            self.process.join(5)
            outcome.status, outcome.message = FAILED, f"its process ended with {self.process.exitcode}"
        outcome.seconds = time.monotonic() - started
        outcome.status = _judged(outcome)
        if outcome.status in (FAILED, CUT_OFF):
            # a failed kernel may have left the device unusable, and a stuck one still runs
            self.end()
        return outcome

    def end(self) -> None:
        """End the process, and those that it started."""
        if self.process is not None:
            self.connection.close()
            # one that has just started has no group yet
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.kill()
            self.process.join()
            self.process = None

    def _start(self, deadline: float) -> None:
        if self.process is None:
            context = get_context("spawn")
            self.connection, theirs = context.Pipe()
            self.process = context.Process(target=_work, args=(theirs, self.tiny))
            self.process.start()
            # so that the end of the process is the end of the pipe
            theirs.close()
            self._hear(min(time.monotonic() + START, deadline))

    def _hear(self, limit: float) -> Any:
        """The next message. Raises TimeoutError: there is none until then. EOFError: the process has ended."""
        if not self.connection.poll(max(limit - time.monotonic(), 0)):
            raise TimeoutError
        return self.connection.recv()


def _judged(outcome: Outcome) -> str:
    """The status, with what the figures say of it."""
    if outcome.status == CUT_OFF:
        return CUT_OFF
    if outcome.status == FAILED or any(each.error for each in outcome.figures):
        return FAILED
    return MISSED if any(each.holds is False for each in outcome.figures) else outcome.status


def _work(connection: Any, tiny: bool) -> None:
    """The process: sends the figures of each check it is asked for, then (status, message)."""
    # a group of its own, which can be ended with all that checks start
    os.setsid()
    _let_segments_grow()
    machine = Machine(tiny)
    connection.send("ready")
    while True:
        try:
            module, _, name = connection.recv().partition(":")
        # the other end is gone
        except EOFError:
            return
        ended = (OK, "")
        try:
            for figure in getattr(import_module(module), name)(machine):
                connection.send(figure)
        except NeedsGpu as needed:
            ended = NO_GPU, str(needed)
        # whatever it raises, the others run
        except (Exception, SystemExit) as error:
            ended = FAILED, f"{type(error).__name__}: {one_line(error, 500)}"
        forget_graphs()
        release()
        connection.send(ended)
