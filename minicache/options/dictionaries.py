"""Configs from and to flat dictionaries: the parameters of a command, and run.json."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin

from minicache.errors import ConfigError
from minicache.options.declare import KEY, flag

Config = TypeVar("Config")


def fill(config: type[Config], given: Mapping[str, Any]) -> Config:
    """The config with these values by name, also those of the dataclasses in its fields; missing values keep their defaults.

    Raises:
        ConfigError: a value is not allowed or has a type that the option never has.
    """
    require_types(config, given)
    values = {}
    for item in fields(config):  # type: ignore[arg-type]
        if is_dataclass(item.type):
            values[item.name] = fill(item.type, given)  # type: ignore[arg-type]
        elif item.name in given:
            values[item.name] = _typed(item.type, given[item.name])
    return config(**values)


def _typed(kind: Any, value: Any) -> Any:
    if get_origin(kind) is tuple:
        return tuple(value or ())
    return Path(value) if value is not None and kind in (Path, Path | None) else value


def require_types(config: type, given: Mapping[str, Any]) -> None:
    """Check the types of values by name, and the bounds of numbers. Names that are no options of the config are ignored.

    Raises:
        ConfigError: a value has a type that the option never has, or is out of its bounds.
    """
    for item in fields(config):
        if isinstance(item.type, type) and is_dataclass(item.type):
            require_types(item.type, given)
        elif item.name in given and not _fits(item.type, given[item.name]):
            raise ConfigError(f"{flag(item.name)}: expected another kind of value, got {str(given[item.name])[:40]!r}")
        elif KEY in item.metadata and isinstance(given.get(item.name), int | float):
            item.metadata[KEY].check(flag(item.name), given[item.name])


def _fits(kind: Any, value: object) -> bool:
    if isinstance(kind, UnionType):
        return any(_fits(one, value) for one in get_args(kind))
    if get_origin(kind) is tuple:
        return isinstance(value, list | tuple | None) and all(_fits(get_args(kind)[0], each) for each in value or ())
    if kind in (int, float):
        return isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
    return value is None if kind is NoneType else isinstance(value, str | Path if kind is Path else kind)


def flat(config: Any) -> dict[str, Any]:
    """The values of a config by name, as JSON can hold them: the inverse of `fill`."""
    values: dict[str, Any] = {}
    for item in fields(config):
        value = getattr(config, item.name)
        values |= flat(value) if is_dataclass(value) else {item.name: _plain(value)}
    return values


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value
