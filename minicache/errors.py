"""What can go wrong for a user, as a tree.

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
    """A field in which a cache is not what was expected. changes_values: of the logprobs, and not only of how they are stored."""

    field: str
    found: Any
    expected: Any
    changes_values: bool


class MinicacheError(Exception):
    """Base of everything a user can cause."""


class ConfigError(MinicacheError):
    """An option has a value that cannot work."""


class DataError(MinicacheError):
    """A preference file cannot be read at all."""


class RowRefused(DataError):
    """One row cannot become a pair.

    `reason` is a short stable code that reports are counted by; the message says what was wrong in this row; `line` is
    where it stands in its file, once a reader has set it.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.line = 0

    def __reduce__(self) -> tuple[type["RowRefused"], tuple[str, str], dict[str, Any]]:
        return type(self), (self.reason, str(self)), vars(self)  # it is sent between processes


class CacheError(MinicacheError):
    """A reference cache cannot be used."""


class CacheNotFound(CacheError):
    """There is no reference cache at this path."""


class CacheMismatch(CacheError):
    """The cache was made with other options, another model or another tokenizer.

    differences: field by field, where they are fields of its identity. sides: what found and expected are called.
    """

    def __init__(
        self, message: str, differences: Sequence[Difference] = (), sides: tuple[str, str] = ("found", "expected")
    ) -> None:
        super().__init__(message)
        self.differences, self.sides = list(differences), sides

    def __reduce__(self) -> tuple[type["CacheMismatch"], tuple[str], dict[str, Any]]:
        return type(self), (str(self),), vars(self)  # it is sent between processes


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
    """An object store cannot be reached, or refuses. What was finished stays, and the same call goes on."""


class OutputError(MinicacheError):
    """A result cannot be written."""


class RunBusy(OutputError):
    """Another process is at work on this run."""
