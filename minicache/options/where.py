"""The place of a reference cache: a directory or a URL, with a weight behind it if several are mixed."""

import re
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from minicache.errors import ConfigError

# The place of a reference cache: a directory, or a URL in an object store or of the Hub.
Where = Path | str
# The beginning of the URLs of the Hugging Face Hub, at which caches are only read.
HUB = "hf://"


def local_path(where: Where) -> Path | None:
    """The directory of a path or a `file:///path` URL; None for a place in an object store.

    Raises:
        ConfigError: a file URL has another form.
    """
    if isinstance(where, Path) or "://" not in where:
        return Path(where)
    parts = urlsplit(where)
    if parts.scheme != "file":
        return None
    if parts.netloc not in ("", "localhost") or not parts.path:
        raise ConfigError(f"{where}: expected file:///a/path with three slashes, or just the path")
    # with C:/a for /C:/a on Windows
    return Path(url2pathname(parts.path))


def require_writable(where: Where) -> None:
    """Raises ConfigError: nothing can be written to this place."""
    if str(where).startswith(HUB):
        raise ConfigError(
            f"--ref-cache {where}: is read only; expected a directory or an object store to write to: make the cache there, then "
            "`minidpo push CACHE org/name`"
        )


def different(places: Iterable[Where]) -> bool:
    """Whether no two of these are the same place."""
    named = [(place, local_path(place)) for place in places]
    return len({_resolved(path) if path else str(url).rstrip("/") for url, path in named}) == len(named)


def _resolved(path: Path) -> Path:
    """The path without links; as it is where the working directory was removed, from which it begins."""
    try:
        return path.resolve()
    except OSError:
        return path


def split_weight(where: Where) -> tuple[Where, float | None]:
    """`a/:0.7` -> `a/` and 0.7; `s3://bucket/a:0.7` likewise. A place without a weight as it is, such as `s3://host:9000`."""
    place, _, number = str(where).rpartition(":")
    if place and re.fullmatch(r"[0-9]*\.?[0-9]+(e-?[0-9]+)?", number) and not _is_port(place, number):
        return place, float(number)
    return where, None


def _is_port(place: str, number: str) -> bool:
    """Whether a number behind `scheme://host` and a colon is a port. Behind a URL's path, or with a point, it is a weight."""
    return number.isdecimal() and re.fullmatch(r"[^/]+://[^/]*", place) is not None
