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
    │   └── RunDiverged         a training run's numbers are no longer finite
    ├── HandshakeError          the model does not reproduce the cached logprobs
    ├── ProcessLost             another process of the run has died
    ├── StoreError              an object store cannot be reached, or refuses
    └── OutputError             a result cannot be written
        └── RunBusy             another process is at work on this run

The command line prints the message in red and exits with code 1. Anything that is not a `MinicacheError` is a bug.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple


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


class HandshakeError(MinicacheError):
    """The model does not reproduce the cached logprobs."""


class ProcessLost(MinicacheError):
    """Another process of the run has died."""


class StoreError(MinicacheError):
    """An object store cannot be reached, or refuses. What was finished stays; the same command resumes."""


class OutputError(MinicacheError):
    """A result cannot be written."""


class RunBusy(OutputError):
    """Another process is at work on this run."""


# torch's errors are recognised by name and text, so that torch need not be imported.


def is_lost_peer(error: BaseException) -> bool:
    """Whether it is a network error of torch.distributed, which follows the death of another process."""
    return type(error).__name__.startswith("Dist") or "gloo" in str(error)


def is_full_memory(error: BaseException) -> bool:
    """Whether it says that a GPU's or the CPU's memory is full; for the latter torch raises a plain RuntimeError."""
    # mps and npu raise a plain RuntimeError too
    texts = ("allocate memory", "out of memory")
    named = type(error).__name__ == "OutOfMemoryError" or any(text in str(error) for text in texts)
    return isinstance(error, MemoryError) or named
