"""What came of a piece of work on one rank, so that the others can go on with it or raise the same error."""

import pickle
from collections.abc import Callable
from typing import NoReturn, TypeVar

from minicache.errors import MinicacheError, ProcessLost, in_words, is_lost_peer
from minicache.text import one_line

T = TypeVar("T")


def outcome_of(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """The result of `work`, or what it raised, a full memory as one line. An interruption is no outcome."""
    try:
        return work(), None
    except Exception as error:
        if is_lost_peer(error):
            raise
        return None, in_words(error) or error


def portable(error: Exception | None) -> MinicacheError | None:
    """An error that another rank can raise: itself, or a line in place of a bug's traceback."""
    if error is None:
        return None
    if not isinstance(error, MinicacheError):
        return ProcessLost(f"it failed with {type(error).__name__}: {one_line(error, 200)}")
    try:
        pickle.dumps(error)
        return error
    except Exception:
        return MinicacheError(str(error))


def raise_agreed(own: Exception | None, agreed: MinicacheError) -> NoReturn:
    """Raise the error that all ranks raise; a bug of this rank shows its own traceback."""
    if own is not None and not isinstance(own, MinicacheError):
        raise own
    raise agreed from own
