"""Several requests at once, their answers one by one in the caller's thread."""

import time
from collections.abc import Callable, Iterator, Sequence
from queue import Empty, Queue
from threading import Lock, Thread

from minicache.judge.server import ChatServer, Reply, Stopped

# Seconds that requests under way get at the end of the work: they are paid for.
GRACE = 2.0
# Seconds after which a wait can be interrupted, on Windows.
TICK = 0.2

Came = tuple[int, Reply | BaseException]


def ask_all(server: ChatServer, questions: Sequence[str], at_once: int, heard: Callable[[int, Reply], None]) -> None:
    """Ask all questions, `at_once` at a time. heard: gets the number of a question and its reply, as they come, in this thread.

    When a request fails for good, or the user interrupts, no other is sent; replies that come within two seconds still count.

    Raises:
        JudgeError: a request failed.
    """
    numbers, lock, came = iter(range(len(questions))), Lock(), Queue[Came]()
    # Threads of a pool would keep the process from ending until their last request does.
    workers = [
        Thread(target=_work, args=(server, questions, numbers, lock, came), daemon=True)
        for _ in range(min(at_once, len(questions)))
    ]
    for worker in workers:
        worker.start()
    try:
        for _ in questions:
            _hear(_next(came), heard)
    finally:
        server.stop.set()
        _hear_the_rest(workers, came, heard)


def _work(
    server: ChatServer, questions: Sequence[str], numbers: Iterator[int], lock: Lock, came: "Queue[Came]"
) -> None:
    """Ask one question after another, until none is left or `server.stop` is set."""
    while True:
        with lock:
            number = next(numbers, None)
        if number is None:
            return
        try:
            came.put((number, server.ask(questions[number])))
        except Stopped:
            return
        # raised again where the answers are read
        except BaseException as error:
            came.put((number, error))
            return


def _next(came: "Queue[Came]") -> Came:
    while True:
        try:
            return came.get(timeout=TICK)
        except Empty:
            continue


def _hear(one: Came, heard: Callable[[int, Reply], None]) -> None:
    number, answer = one
    if isinstance(answer, BaseException):
        raise answer
    heard(number, answer)


def _hear_the_rest(workers: list[Thread], came: "Queue[Came]", heard: Callable[[int, Reply], None]) -> None:
    """Take the replies of the requests that are still under way, for a short while."""
    end = time.monotonic() + GRACE
    for worker in workers:
        worker.join(max(0.0, end - time.monotonic()))
    while not came.empty():
        number, answer = came.get()
        if isinstance(answer, Reply):
            heard(number, answer)
