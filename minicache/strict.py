"""JSON -> dataclass, with every entry checked: a manifest may come from a stranger who computed a digest that fits it."""

import reprlib
from dataclasses import is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

NAMES = {
    str: "text",
    int: "a whole number from 0",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "an object",
    NoneType: "null",
}


def read_as(hint: Any, value: object, what: str, skip_unknown: bool = False) -> Any:
    """`value` as a dataclass, a list or dict of a kind, text, a number, a whole number from 0 to 2**63 - 1, a truth value, null,
    a literal, or a union of these; with `Any` as it is.

    what: its name in messages.

    skip_unknown: entries that a dataclass has no field for are passed over: a later version wrote them.

    Raises:
        ValueError: an entry has another type; the message names it and what was expected. TypeError: a dataclass has other fields.
    """
    if hint is Any:
        return value
    if is_dataclass(hint):
        hints = get_type_hints(hint)
        entries = {name: each for name, each in _of(dict, value, what) if name in hints or not skip_unknown}
        return hint(  # type: ignore[operator]
            **{
                name: read_as(hints.get(name, Any), each, f"{what}.{name}", skip_unknown)
                for name, each in entries.items()
            }
        )
    origin, kinds = get_origin(hint) or hint, get_args(hint)
    if origin is list:
        return [
            read_as(kinds[0], each, f"{what}[{at}]", skip_unknown) for at, each in enumerate(_of(list, value, what))
        ]
    if origin is dict:
        return {name: read_as(kinds[1], each, f"{what}.{name}", skip_unknown) for name, each in _of(dict, value, what)}
    if origin in (UnionType, Union):
        return read_as(_fitting(kinds, value, what), value, what, skip_unknown)
    if not _is(hint, value):
        raise ValueError(f"{what}: expected {_name(hint)}, got {shortened(value)!r}")
    return value


def shortened(value: object) -> str:
    """The first characters of a value as text. Of lists in lists only the first: in a pickle a few may stand for endless ones."""
    return (reprlib.repr(value) if isinstance(value, list | tuple | dict | set) else str(value))[:40]


def _fitting(kinds: tuple[Any, ...], value: object, what: str) -> Any:
    """The member of a union that a value can only be."""
    for kind in kinds:
        plain = get_origin(kind) or kind
        if isinstance(value, dict | list) and (dict if is_dataclass(plain) else plain) is type(value):
            return kind
        if not isinstance(value, dict | list) and not is_dataclass(plain) and _is(kind, value):
            return kind
    raise ValueError(f"{what}: expected {' or '.join(map(_name, kinds))}, got {shortened(value)!r}")


def _is(hint: Any, value: object) -> bool:
    """Whether a value that is no object and no list is of this kind."""
    if get_origin(hint) is Literal:
        return any(type(value) is type(each) and value == each for each in get_args(hint))
    if hint is float:
        return type(value) is float or (type(value) is int and abs(value) < 2**63)
    if hint is int:
        return type(value) is int and 0 <= value < 2**63
    return type(value) is (NoneType if hint is None else hint)


def _name(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(map(str, get_args(hint)))
    return NAMES[dict if is_dataclass(hint) else get_origin(hint) or hint]


def _of(kind: type, value: object, what: str) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{what}: expected {NAMES[kind]}, got {shortened(value)!r}")
    return value.items() if isinstance(value, dict) else value
