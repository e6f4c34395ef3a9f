"""Bounds that several options share; each failure is a `ConfigError` that names the option."""

import re

from minicache.errors import ConfigError


def one_of(option: str, value: str | None, allowed: tuple[str | None, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{option}: expected one of {', '.join(filter(None, allowed))}, got {value!r}")


def split_share(shard: str | None) -> tuple[int, int]:
    """K and N of "K/N": a job's number, from 1, and how many there are; (1, 1) without one. Raises ConfigError: nonsense."""
    parts = re.fullmatch("([0-9]{1,9})/([0-9]{1,9})", shard if shard is not None else "1/1")
    number, of = (int(parts[1]), int(parts[2])) if parts else (0, 0)
    if not 1 <= number <= of:
        raise ConfigError(f"--shard: expected K/N with K from 1 to N, as 3/64, got {shard!r}")
    return number, of


def at_least(option: str, value: float | None, least: float) -> None:
    if value is not None and not value >= least:
        raise ConfigError(f"{option}: expected {least} or more, got {value}")


def at_most(option: str, value: float | None, most: float) -> None:
    if value is not None and not value <= most:
        raise ConfigError(f"{option}: expected {most} or less, got {value}")


def above_zero(option: str, value: float | None) -> None:
    if value is not None and not 0 < value < float("inf"):
        raise ConfigError(f"{option}: expected a number above 0, got {value}")


def share(name: str, value: float | None) -> None:
    if value is not None and not 0 <= value <= 1:
        raise ConfigError(f"{name}: expected a share from 0 to 1, got {value}")
