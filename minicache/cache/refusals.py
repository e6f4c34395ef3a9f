"""refused.jsonl: the rows that stage one could not use, beside the pairs."""

import json

REFUSED_FILE = "refused.jsonl"
Refusal = dict[str, str | int]  # source (number of the file in the log), file, line, reason, message


def source_of(line: str) -> int | None:
    """The number of the file that a line of the list is about; None if this program did not write the line."""
    try:
        source = json.loads(line)["source"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    return source if type(source) is int else None
