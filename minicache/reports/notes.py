"""What became of the parts of a file's rows that are no tokens of a pair, in words."""

from collections.abc import Mapping
from typing import Any

# Kind of a note (`data.records.Note`) -> what it says of so many rows.
KINDS = {
    "system-turn": "{rows}: the conversation's own system turn is used, not the system column",
    "left-out": "{rows}: the chat template leaves thoughts of earlier turns, or the text beside a call, out of the prompt",
    "tie": "{rows}: answers that are equally good make no pair with each other",
    "both-unsafe": "{rows}: both answers are marked unsafe; the more helpful one is preferred, as the data's authors do",
    "special-text": "{rows} with the text of a special token, first {example}",
}
# Share of rows from which they look as if a chat template had been applied to them before.
NEARLY_ALL = 0.9
RENDERED = (
    "the contents look rendered: a chat template was applied to them before, and is now written around them once more. "
    "Give the texts without it; or, for texts as TRL joins them, see docs/trl.md, plain text"
)
COLUMNS_LISTED = 12


def notes_on(source: Mapping[str, Any]) -> list[str]:
    """Lines on a source, a dict as `cache.manifest.Source`: its options, columns that nothing reads, and notes."""
    lines = []
    if options := source.get("reading"):
        lines.append("read with " + " ".join(f"--{name.replace('_', '-')} {value}" for name, value in options.items()))
    if unused := source.get("unused"):
        lines.append(f"not used: {_columns(unused, source['rows'])}")
    used = source["rows"] - sum(source["refused"].values())
    for kind, count in (source.get("noted") or {}).items():
        text = KINDS.get(kind, f"{{rows}}: {kind}")
        lines.append(text.format(rows=_rows(count), example=source.get("example")))
        if kind == "special-text" and count >= NEARLY_ALL * used:
            lines.append(RENDERED)
    return lines


def _rows(count: int) -> str:
    return f"{count:,} rows" if count > 1 else "1 row"


def _columns(unused: Mapping[str, int], rows: int) -> str:
    """The names of columns, each with its number of rows where these are not all."""
    shown = [name if count == rows else f"{name} ({_rows(count)})" for name, count in unused.items()]
    more = [f"{len(shown) - COLUMNS_LISTED} more"] if len(shown) > COLUMNS_LISTED else []
    return ", ".join(shown[:COLUMNS_LISTED] + more)
