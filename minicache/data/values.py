"""Values of JSON, as a row's columns and turns hold them: texts, numbers, lists and the JSON text of such; refused by name else."""

import json
import math
from typing import Any

from minicache.data.compressed import MOST_ROW
from minicache.data.records import is_blank
from minicache.errors import RowRefused


def text_of(value: object, field: str) -> str:
    """A text, as it is.

    Raises:
        RowRefused: it is none, is too long, or cannot be encoded.
    """
    if not isinstance(value, str):
        raise RowRefused("wrong-type", f"{field!r} must be text, got {kind_of(value)}")
    if len(value) > MOST_ROW:
        raise RowRefused("too-large", f"{field!r} has {len(value):,} characters, expected {MOST_ROW:,} or fewer")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RowRefused("bad-unicode", f"{field!r} holds a lone surrogate, which UTF-8 cannot encode") from None
    return value


def number_of(value: object, field: str) -> float:
    """A finite number, to compare answers by. Raises RowRefused: it is none, or is too large to be one."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RowRefused("wrong-type", f"{field!r} must be a number, got {kind_of(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise RowRefused("wrong-type", f"{field!r} must be a finite number, got {str(value)[:40]}")
    return number


def json_of(text: str, field: str) -> Any:
    """The value of a JSON text. Raises RowRefused: it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise RowRefused("wrong-type", f"{field!r}: expected JSON, got {text[:40]!r}") from None


def json_list(value: object, field: str) -> list[Any]:
    """A list of objects, or the JSON text of one, or of a list of JSON texts (`tools`, `documents`); [] of what is empty.

    Raises:
        RowRefused: it is none.
    """
    if is_blank(value):
        return []
    if isinstance(value, str):
        value = json_of(value, field)
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise RowRefused("wrong-type", f"{field!r} must be a list or the JSON text of one, got {kind_of(value)}")
    items = [json_of(item, field) if isinstance(item, str) and item.lstrip()[:1] == "{" else item for item in value]
    require_sound(items)
    return items


def require_sound(value: object) -> None:
    """Check every text in a JSON value. Raises RowRefused: a text within a value is too long or cannot be encoded."""
    if isinstance(value, str):
        text_of(value, "a text")
    elif isinstance(value, dict):
        for name, each in value.items():
            require_sound(name)
            require_sound(each)
    elif isinstance(value, list):
        for each in value:
            require_sound(each)


# --- words for messages ---


def kind_of(value: object) -> str:
    """What a JSON value is, in words."""
    if value is None:
        return "null"
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), type(value).__name__)


def listed(names: object) -> str:
    """Names in quotes, the first ones of many."""
    assert isinstance(names, (list, dict))
    return ", ".join(repr(str(name)[:40]) for name in list(names)[:8]) or "none"
