"""Rows of a preference file -> encoded pairs, on all cores, in the order of the rows.

A worker is this file in a Python process of its own: it reads rows from a pipe and writes the encoded pairs back. It is not
`multiprocessing`, because spawned processes run the user's main script again and outlive a killed parent, and a fork
inherits locks. These workers end when the pipe closes.
"""

import logging
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

from minicache.data.columns import Reading
from minicache.data.encode import CHUNK, Encoded, Encoder
from minicache.data.formats import to_pairs
from minicache.data.records import Pair
from minicache.errors import OutputError, RowRefused
from minicache.interpreter import python_command, python_environment
from minicache.machine import cores

log = logging.getLogger(__name__)

# Line number and row, as `read_rows` gives them.
Row = tuple[int, object]
# An encoded pair, or the refusal of a row.
Result = Encoded | RowRefused
# Rows encoded before workers are started, which takes half a second.
ALONE = 32 * CHUNK
# Most workers: one process can read rows and write blocks for about so many.
MOST = 16
# Chunks per worker that are waiting, in work or done.
AHEAD = 2


@dataclass(frozen=True)
class RowEncoder:
    """Encodes the rows of a file. number: index of the file in the cache's list of sources."""

    encoder: Encoder
    file: str
    reading: Reading
    number: int

    def encode(self, rows: Iterable[Row]) -> Iterator[Result]:
        """For each pair of the rows, in order: the encoded pair, or the refusal of its row."""
        return self.encoder.encode_all(self._pairs(rows), self.number)

    def _pairs(self, rows: Iterable[Row]) -> Iterator[Pair | RowRefused]:
        for line, row in rows:
            try:
                if isinstance(row, RowRefused):
                    raise row
                yield from to_pairs(row, self.file, line, self.reading)
            except RowRefused as refusal:
                refusal.line = line
                yield refusal

    def encode_by_all_cores(self, rows: Iterable[Row]) -> Generator[Result, None, None]:
        """As `encode`, with several processes where there are many rows. Only a few chunks of rows are in memory.

        Raises:
            OutputError: a worker died.
        """
        rows = iter(rows)
        yield from self.encode(islice(rows, ALONE))
        # OMP_NUM_THREADS does not count: the other processes of a run wait for this one
        workers = min(MOST, cores())
        if workers == 1:
            yield from self.encode(rows)
        elif (first := next(rows, None)) is not None:
            log.debug("%s: encoding in %d processes", self.file, workers)
            with _Pool(self, workers) as pool:
                yield from pool.encode(first, rows)


class _Pool:
    """Worker processes, and a thread for each that waits for its answers."""

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

    def encode(self, first: Row, rows: Iterator[Row]) -> Iterator[Result]:
        """For each row, in order: the encoded pair or the refusal. An error in reading is raised after the rows before it."""
        coming: deque[Future[list[Result]]] = deque()
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

    def _ask(self, chunk: list[Row]) -> list[Result]:
        worker = self.idle.get()
        try:
            return worker.ask(chunk)
        finally:
            self.idle.put(worker)


class _Worker:
    """A worker process, seen from its parent."""

    def __init__(self, encoder: RowEncoder) -> None:
        self.process = subprocess.Popen(
            [
                *python_command(),
                "-c",
                f"import sys; sys.path = sys.argv[1:]; import {__name__} as it; it.serve()",
                *sys.path,
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**python_environment(), "TOKENIZERS_PARALLELISM": "false"},
            # Ctrl-C reaches the parent alone, which then ends the worker.
            process_group=0,
        )
        # a copy without the compiled template, which cannot be pickled
        tokenizer = replace(encoder.encoder.tokenizer)
        self.encoder: RowEncoder | None = replace(encoder, encoder=replace(encoder.encoder, tokenizer=tokenizer))

    def ask(self, chunk: list[Row]) -> list[Result]:
        """The encoded pairs or refusals of a chunk of rows.

        Raises:
            OutputError: the process died.
        """
        assert self.process.stdin and self.process.stdout
        try:
            if self.encoder:
                pickle.dump(self.encoder, self.process.stdin, pickle.HIGHEST_PROTOCOL)
                self.encoder = None
            pickle.dump(chunk, self.process.stdin, pickle.HIGHEST_PROTOCOL)
            self.process.stdin.flush()
            answer: list[Result] | Exception = pickle.load(self.process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            raise OutputError(
                f"a process that encodes rows has died (exit code {self.process.wait()}); expected memory for one such process "
                "per core; run the same command again to go on (taskset gives it fewer cores)"
            ) from error
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        """Close both pipes."""
        assert self.process.stdin and self.process.stdout
        self.process.stdout.close()
        # closing flushes data that an ended process no longer reads
        with suppress(OSError):
            self.process.stdin.close()


def serve() -> None:
    """Run the worker: answer chunks until the pipe closes."""
    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, signal.SIG_IGN)
    # each of these means that the parent has ended
    with suppress(EOFError, BrokenPipeError, pickle.UnpicklingError):
        encoder: RowEncoder = pickle.load(sys.stdin.buffer)
        while True:
            pickle.dump(_answer(encoder, pickle.load(sys.stdin.buffer)), sys.stdout.buffer, pickle.HIGHEST_PROTOCOL)
            sys.stdout.buffer.flush()
    # a normal exit would flush to the closed pipe once more
    os._exit(0)


def _answer(encoder: RowEncoder, chunk: list[Row]) -> list[Result] | Exception:
    try:
        encoded = list(encoder.encode(chunk))
    except Exception as error:
        error.add_note(traceback.format_exc())
        return error
    for item in encoded:
        if not isinstance(item, RowRefused):
            # computed here, the cached digest is pickled with the pair
            item.pair.digest  # noqa: B018
    return encoded
