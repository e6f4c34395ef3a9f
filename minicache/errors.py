"""The errors that a user can cause, as a tree.

    MinicacheError              one line: what was expected, what came, what to do
    ├── ConfigError             an option has a value that cannot work
    ├── DataError               a preference file cannot be read at all
    │   └── RowRefused          one row of it cannot become a pair (counted, listed, skipped)
    ├── CacheError              a reference cache cannot be used
    │   ├── CacheNotFound       there is none at this path
    │   ├── CacheMismatch       it was made with other options, another model or another tokenizer
    │   ├── CacheIncomplete     some of its blocks are not scored yet
    │   └── CacheDamaged        bytes on disk are not the bytes that were written
    ├── ModelError              a model or tokenizer cannot be loaded or used
    │   ├── RunDiverged         a training run's numbers are no longer finite
    │   └── FullMemory          the memory of a device or of the machine is full
    ├── HandshakeError          the model does not reproduce the cached logprobs
    ├── ProcessLost             another process of the run has died
    ├── StoreError              an object store cannot be reached, or refuses
    ├── JudgeError              the server of a judge cannot be reached, or refuses
    └── OutputError             a result cannot be written
        └── RunBusy             another process is at work on this run

The command line prints the message in red and exits with code 1. Anything that is not a `MinicacheError` is a bug.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from minicache.machine import free_bytes_here


class Difference(NamedTuple):
    """A field of a cache that is not as expected. changes_values: it changes logprobs, not only how they are stored."""

    field: str
    found: Any
    expected: Any
    changes_values: bool


class MinicacheError(Exception):
    """Base of every error that a user can cause."""


class ConfigError(MinicacheError):
    """An option has a value that cannot work."""


class DataError(MinicacheError):
    """A preference file cannot be read at all."""


class RowRefused(DataError):
    """One row cannot become a pair.

    reason: a short stable code, by which reports count rows. line: the row's line in its file, set by the reader. The message
    says what is wrong with this row.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.line = 0

    def __reduce__(self) -> tuple[type["RowRefused"], tuple[str, str], dict[str, Any]]:
        """Pickle the attributes too: workers send refusals to their parent."""
        return type(self), (self.reason, str(self)), vars(self)


class CacheError(MinicacheError):
    """A reference cache cannot be used."""


class CacheNotFound(CacheError):
    """There is no reference cache at this path."""


class CacheMismatch(CacheError):
    """The cache was made with other options, another model or another tokenizer.

    differences: the fields of the identity that differ. sides: names of the columns found and expected.
    """

    def __init__(
        self, message: str, differences: Sequence[Difference] = (), sides: tuple[str, str] = ("found", "expected")
    ) -> None:
        super().__init__(message)
        self.differences, self.sides = list(differences), sides

    def __reduce__(self) -> tuple[type["CacheMismatch"], tuple[str], dict[str, Any]]:
        """Pickle the attributes too: ranks send errors to each other."""
        return type(self), (str(self),), vars(self)


class CacheIncomplete(CacheError):
    """Some blocks of the cache are not scored yet."""


class CacheDamaged(CacheError):
    """Bytes on disk are not the bytes that were written."""


class ModelError(MinicacheError):
    """A model or tokenizer cannot be loaded or used."""


class RunDiverged(ModelError):
    """A training run's loss or gradient is no longer finite."""


class FullMemory(ModelError):
    """The memory of a device or of the machine is full."""


class HandshakeError(MinicacheError):
    """The model does not reproduce the cached logprobs."""


class ProcessLost(MinicacheError):
    """Another process of the run has died."""


class StoreError(MinicacheError):
    """An object store cannot be reached, or refuses. What was finished stays; the same command resumes."""


class JudgeError(MinicacheError):
    """The server of a judge cannot be reached, or refuses. Verdicts that came stay; the same command goes on."""


class OutputError(MinicacheError):
    """A result cannot be written."""


class RunBusy(OutputError):
    """Another process is at work on this run."""


# torch's errors are recognised by name and text, so that torch need not be imported.


def is_lost_peer(error: BaseException) -> bool:
    """Whether it is a network error of torch.distributed, which follows the death of another process."""
    return type(error).__name__.startswith("Dist") or "gloo" in str(error)


def said_by_network(error: BaseException) -> str:
    """What a network error of torch.distributed says, in 200 characters: the cause, which NCCL writes at its end."""
    whole = " ".join(str(error).split())
    return (whole.partition("Last error:")[2].strip() or whole)[:200] or type(error).__name__


def is_full_memory(error: BaseException) -> bool:
    """Whether it says that a device's or the machine's memory is full, for which torch and its libraries have no one error."""
    return (
        isinstance(error, MemoryError | FullMemory)
        or type(error).__name__ == "OutOfMemoryError"
        or bool(isinstance(error, RuntimeError | OSError) and FULL.search(str(error)))
    )


# In the errors of torch, CUDA's libraries and the C library.
FULL = re.compile(r"out of memory|(can't|cannot) allocate|not enough memory|_ALLOC_FAILED", re.IGNORECASE)
ASKED = re.compile(r"(?:[Tt]ried to allocate|Unable to allocate) ([\d.,]+ ?[KMGTP]?i?[Bb]\w*)")
ON_CPU = re.compile(r"DefaultCPUAllocator|Cannot allocate memory")
FREE = re.compile(r"of which ([\d.]+ [KMGT]?i?[Bb]\w*) is free")


def in_words(error: BaseException, what: str = "this run", advice: str = "") -> "FullMemory | None":
    """The line for an error that says, or was raised because, memory is full; None for any other error.

    what: what does not fit. advice: what to try.
    """
    cause: BaseException | None = error
    while cause is not None and not is_full_memory(cause):
        cause = cause.__cause__
    if cause is None or isinstance(cause, FullMemory):
        return cause
    error = cause
    text = " ".join(str(error).split())
    asked, free = ASKED.search(text), FREE.search(text)
    numbers = [f"{asked[1]} more were asked for" if asked else text[:160]]
    if free:
        numbers.append(f"{free[1]} were free")
    elif isinstance(error, MemoryError) or ON_CPU.search(text):
        numbers.append(f"{free_bytes_here() / 1e9:,.1f} GB of the machine's memory are free now")
    numbers_ = f" ({', '.join(filter(None, numbers))})" if any(numbers) else ""
    return FullMemory(
        f"out of memory: {what} does not fit{numbers_}; try {advice or 'a smaller model, rank or batch, or a machine with more'}"
    )


@contextmanager
def fits(what: str, advice: str = "") -> Iterator[None]:
    """Say what does not fit where memory is full, and what to try; see `in_words`.

    Raises:
        FullMemory: memory is full.
    """
    try:
        yield
    # whatever says so; all others pass
    except Exception as error:
        line = in_words(error, what, advice)
        if line is None or line is error:
            raise
        raise line from error
