"""refused.jsonl: the rows that stage one could not use, beside the pairs."""

from collections.abc import Iterable

from minicache.cache.places.place import Place
from minicache.json_lines import JsonLine, json_lines

REFUSED_FILE = "refused.jsonl"
# source (number of the file in the log), file, line, reason, message
Refusal = dict[str, str | int]


def read_refusals(place: Place) -> list[JsonLine]:
    """The lines of a cache's list, also those that this program did not write; none where there is no list."""
    return list(json_lines(place.read(REFUSED_FILE) or b""))


def write_refusals(place: Place, lines: Iterable[str]) -> None:
    """Write the list, a JSON object per line. What UTF-8 cannot hold is escaped as JSON does it."""
    place.write(REFUSED_FILE, "".join(f"{line}\n" for line in lines).encode(errors="backslashreplace"))


def source_of(line: JsonLine) -> int | None:
    """The number of the file that a line of the list is about; None if this program did not write the line."""
    source = line.value.get("source") if isinstance(line.value, dict) else None
    return source if type(source) is int else None
