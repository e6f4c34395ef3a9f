"""What may be named in public: names of the Hub as they are, and of a path its last part alone. No torch."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from minicache.cache.manifest import Log
from minicache.data.hub import FILE
from minicache.hub import ID
from minicache.options.where import HUB, split_weight

# A data set of the Hub as --ref-cache names it.
CACHE_OF_HUB = re.compile(rf"{re.escape(HUB)}datasets/(?P<id>{ID.pattern})(?:[@/].*)?")


def hub_id(name: object) -> str | None:
    """The name of a model of the Hub; None if it is a path of this machine, or has another form."""
    text = str(name)
    return text if ID.fullmatch(text) and not Path(text).exists() else None


def data_set_of(name: str) -> str | None:
    """The data set of the Hub that a file or a cache is from, by the name that a log gives it; None if it is from elsewhere."""
    found = FILE.fullmatch(name) or CACHE_OF_HUB.fullmatch(name)
    return found["id"] if found else None


def public_name(name: object) -> str:
    """A name of the Hub as it is; of a path or a URL the last part, with the weight of a cache behind it."""
    text = str(name)
    if hub_id(text) or data_set_of(text):
        return text
    place, weight = split_weight(text)
    last = re.split(r"[/\\]+", str(place).rstrip("/\\"))[-1]
    return f"{last}:{weight:g}" if weight is not None else last


def public_value(value: Any) -> Any:
    """The value of an option, in which every path is replaced by its public name."""
    if isinstance(value, list | tuple):
        return [public_value(each) for each in value]
    return (
        public_name(value)
        if isinstance(value, Path) or (isinstance(value, str) and re.search(r"[/\\]", value))
        else value
    )


def public_log(log: Log, model: str | None = None) -> Log:
    """A cache's log without the paths of the machine that made it. model: the Hub's name of the reference, if it has another."""
    sources = [replace(source, name=public_name(source.name)) for source in log.sources]
    return replace(log, model=model or public_name(log.model), sources=sources)


def public_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options by name without the paths in their values."""
    return {name: public_value(value) for name, value in options.items()}
