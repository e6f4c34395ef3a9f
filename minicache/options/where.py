"""Where a reference cache lies: a directory or a URL, with a weight behind it where several are mixed."""

import re
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import unquote, urlsplit

from minicache.errors import ConfigError

Where = Path | str  # of a reference cache: a directory, or the URL of a place in an object store


def local_path(where: Where) -> Path | None:
    """The directory that it names, by path or as `file:///path`; None if it lies in an object store."""
    if isinstance(where, Path) or "://" not in where:
        return Path(where)
    parts = urlsplit(where)
    if parts.scheme != "file":
        return None
    if parts.netloc not in ("", "localhost") or not parts.path:
        raise ConfigError(f"{where}: expected file:///a/path with three slashes, or just the path")
    return Path(unquote(parts.path))


def different(places: Iterable[Where]) -> bool:
    """Whether no two of them are one place."""
    named = [(place, local_path(place)) for place in places]
    return len({path.resolve() if path else str(url).rstrip("/") for url, path in named}) == len(named)


def split_weight(where: Where) -> tuple[Where, float | None]:
    """`a/:0.7` -> `a/` and 0.7; `s3://bucket/a:0.7` likewise. A place without a weight as it is, such as `s3://host:9000`."""
    place, _, number = str(where).rpartition(":")
    if place and re.fullmatch(r"[0-9]*\.?[0-9]+(e-?[0-9]+)?", number) and not _is_port(place, number):
        return place, float(number)
    return where, None


def _is_port(place: str, number: str) -> bool:
    """Whether a number behind `scheme://host` and a colon is a port. Behind a URL's path, or with a point, it is a weight."""
    return number.isdecimal() and re.fullmatch(r"[^/]+://[^/]*", place) is not None
