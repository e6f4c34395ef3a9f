"""Libraries that log what no user can act on."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def hushed(name: str, level: int = logging.ERROR) -> Iterator[None]:
    """Within the block a library's logger passes on nothing below `level`."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)
