"""What no single bound can say of an option: shares of jobs."""

import re

from minicache.errors import ConfigError


def split_share(shard: str | None) -> tuple[int, int]:
    """K and N of "K/N": a job's number, from 1, and how many there are; (1, 1) without one. Raises ConfigError: nonsense."""
    parts = re.fullmatch("([0-9]{1,9})/([0-9]{1,9})", shard if shard is not None else "1/1")
    number, of = (int(parts[1]), int(parts[2])) if parts else (0, 0)
    if not 1 <= number <= of:
        raise ConfigError(f"--shard: expected K/N with K from 1 to N, as 3/64, got {shard!r}")
    return number, of
