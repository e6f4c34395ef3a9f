"""JSON -> dataclass, with every entry checked: a manifest may come from a stranger who computed a digest that fits it."""

from dataclasses import is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

NAMES = {str: "text", int: "a whole number from 0", bool: "true or false", list: "a list", dict: "an object"}


def read_as(hint: Any, value: object, what: str) -> Any:
    """`value` as `hint`: a dataclass, a list or dict of one type, text, a whole number from 0 to 2**63 - 1, or true or false.

    what: its name in messages.

    Raises:
        ValueError: an entry has another type; the message names it and what was expected. TypeError: a dataclass has other fields.
    """
    origin = get_origin(hint) or hint
    if is_dataclass(hint):
        hints = get_type_hints(hint)
        return hint(**{name: read_as(hints.get(name), each, f"{what}.{name}") for name, each in _of(dict, value, what)})  # type: ignore[operator]
    if origin is list:
        (kind,) = get_args(hint)
        return [read_as(kind, each, f"{what}[{at}]") for at, each in enumerate(_of(list, value, what))]
    if origin is dict:
        _, kind = get_args(hint)
        return {name: read_as(kind, each, f"{what}.{name}") for name, each in _of(dict, value, what)}
    if hint is not None and (type(value) is not hint or (hint is int and not 0 <= value < 2**63)):  # type: ignore[operator]
        raise ValueError(f"{what}: expected {NAMES[hint]}, got {str(value)[:40]!r}")
    return value


def _of(kind: type, value: object, what: str) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{what}: expected {NAMES[kind]}, got {str(value)[:40]!r}")
    return value.items() if isinstance(value, dict) else value
