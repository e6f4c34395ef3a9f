"""Rows of a preference file -> encoded pairs, by all cores, in the rows' order.

A worker is this file run by a Python of its own: it is handed rows through a pipe and hands back what became of them. Not
`multiprocessing`: its spawned processes run the user's main script again and outlive a parent that was killed, and a
fork inherits locks. These end when the pipe does.
"""

import os
import pickle
import queue
import signal
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice

from minicache.data.encode import CHUNK, Encoder
from minicache.data.formats import to_pair
from minicache.data.records import Pair
from minicache.errors import OutputError, RowRefused
from minicache.pairs import EncodedPair

Row = tuple[int, object]  # line, and what stands there, as `read_rows` gives it
Encoded = tuple[EncodedPair, bool] | RowRefused  # the pair and whether it was truncated, or why it is none
ALONE = 32 * CHUNK  # rows encoded before workers are worth starting: that takes them half a second
MOST = 16  # workers: one process can read rows and write blocks for about as many
AHEAD = 2  # chunks that each worker has before it or done


@dataclass(frozen=True)
class RowEncoder:
    """All it takes to make pairs of a file's rows. number: the file's, in the cache's list of sources."""

    encoder: Encoder
    file: str
    format: str
    number: int

    def encode(self, rows: Iterable[Row]) -> Iterator[Encoded]:
        """In order, for each row: the encoded pair and whether it was truncated, or the refusal."""
        return self.encoder.encode_all(self._pairs(rows), self.number)

    def _pairs(self, rows: Iterable[Row]) -> Iterator[Pair | RowRefused]:
        for line, row in rows:
            try:
                if isinstance(row, RowRefused):
                    raise row
                yield to_pair(row, self.file, line, self.format)
            except RowRefused as refusal:
                refusal.line = line
                yield refusal

    def encode_by_all_cores(self, rows: Iterable[Row]) -> Generator[Encoded, None, None]:
        """As `encode`, in several processes once there are many rows. Only a few chunks of rows are in memory.

        Raises:
            OutputError: a worker died.
        """
        rows = iter(rows)
        yield from self.encode(islice(rows, ALONE))
        workers = min(MOST, _cores())
        if workers == 1:
            yield from self.encode(rows)
        elif (first := next(rows, None)) is not None:
            with _Pool(self, workers) as pool:
                yield from pool.encode(first, rows)


class _Pool:
    """Workers, each with a thread that waits for it."""

    def __init__(self, encoder: RowEncoder, workers: int) -> None:
        self.workers = [_Worker(encoder) for _ in range(workers)]
        self.idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self.workers:
            self.idle.put(worker)
        self.threads = ThreadPoolExecutor(workers)

    def __enter__(self) -> "_Pool":
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self.workers:
            worker.process.kill()
        self.threads.shutdown(cancel_futures=True)
        for worker in self.workers:
            worker.process.wait()
            worker.close()

    def encode(self, first: Row, rows: Iterator[Row]) -> Iterator[Encoded]:
        """Chunk by chunk in order. What goes wrong with reading a row is told after what the rows before it became."""
        coming: deque[Future[list[Encoded]]] = deque()
        chunk = [first, *islice(rows, CHUNK - 1)]
        problem: Exception | None = None
        while chunk or coming:
            if chunk:
                coming.append(self.threads.submit(self._ask, chunk))
            if len(coming) >= AHEAD * len(self.workers) or not chunk:
                yield from coming.popleft().result()
            chunk = []
            if problem is None:
                try:
                    chunk = list(islice(rows, CHUNK))
                except Exception as error:
                    problem = error
        if problem:
            raise problem

    def _ask(self, chunk: list[Row]) -> list[Encoded]:
        worker = self.idle.get()
        try:
            return worker.ask(chunk)
        finally:
            self.idle.put(worker)


class _Worker:
    """One such process, as its parent sees it."""

    def __init__(self, encoder: RowEncoder) -> None:
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                f"import sys; sys.path = sys.argv[1:]; import {__name__} as it; it.serve()",
                *sys.path,
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
            process_group=0,  # Ctrl-C is for its parent, which then ends it
        )
        tokenizer = replace(encoder.encoder.tokenizer)  # a copy without its compiled template
        self.encoder: RowEncoder | None = replace(encoder, encoder=replace(encoder.encoder, tokenizer=tokenizer))

    def ask(self, chunk: list[Row]) -> list[Encoded]:
        assert self.process.stdin and self.process.stdout
        try:
            if self.encoder:
                pickle.dump(self.encoder, self.process.stdin, pickle.HIGHEST_PROTOCOL)
                self.encoder = None
            pickle.dump(chunk, self.process.stdin, pickle.HIGHEST_PROTOCOL)
            self.process.stdin.flush()
            answer = pickle.load(self.process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            raise OutputError(
                f"a process that encodes rows has died (exit code {self.process.wait()}); expected memory for one of "
                "them a core; run the same command again to go on (taskset gives it fewer cores)"
            ) from error
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        assert self.process.stdin and self.process.stdout
        self.process.stdout.close()
        with suppress(OSError):  # what it did not read any more
            self.process.stdin.close()


def _cores() -> int:
    """Cores that this process may use, whatever OMP_NUM_THREADS says: the other processes of a run wait for this one."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def serve() -> None:
    """In the worker: chunk after chunk, until the pipe ends."""
    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, signal.SIG_IGN)
    with suppress(EOFError, BrokenPipeError, pickle.UnpicklingError):  # nobody is there any more
        encoder: RowEncoder = pickle.load(sys.stdin.buffer)
        while True:
            pickle.dump(_answer(encoder, pickle.load(sys.stdin.buffer)), sys.stdout.buffer, pickle.HIGHEST_PROTOCOL)
            sys.stdout.buffer.flush()
    os._exit(0)  # else Python would flush to the pipe once more


def _answer(encoder: RowEncoder, chunk: list[Row]) -> list[Encoded] | Exception:
    try:
        encoded = list(encoder.encode(chunk))
    except Exception as error:
        error.add_note(traceback.format_exc())
        return error
    for item in encoded:
        if not isinstance(item, RowRefused):
            item[0].digest  # noqa: B018  # computed here, it travels with the pair
    return encoded
