"""JSON for files and the screen, and JSON lines: one object a line, read and written in one way."""

import json
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from minicache.text import UNSAFE


class JsonLine(NamedTuple):
    """A line that is not blank. number: from 1. value: what it says, None where `error` says why it cannot be read."""

    number: int
    text: str
    value: Any
    error: Exception | None = None


def json_lines(content: bytes) -> Iterator[JsonLine]:
    """The lines of a file's content. Only "\\n" ends one: a text may hold all other characters that `str.splitlines` cuts at."""
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        text = line.decode(errors="replace").removesuffix("\r")
        try:
            yield JsonLine(number, text, json.loads(line.decode()))
        except (ValueError, RecursionError) as error:
            yield JsonLine(number, text, None, error)


def as_text(value: object) -> str:
    """A text as it is, any other value as JSON."""
    return value if isinstance(value, str) else to_json(value)


def to_json(value: object, **options: Any) -> str:
    """A value as JSON in its own script, but for what a terminal would obey or no encoding has, which JSON's escapes stand for.

    options: of `json.dumps`.
    """
    return UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(value, **{"ensure_ascii": False, **options}))


def to_json_lines(rows: Iterable[object]) -> str:
    """The rows as lines, in their own script rather than escaped."""
    return "".join(to_json(row) + "\n" for row in rows)
