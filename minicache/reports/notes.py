"""What became of the parts of a file's rows that are no tokens of a pair, in words."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from minicache.data.columns import as_typed
from minicache.text import Phrase, joined, phrase

# Kind of a note (`data.records.Note`) -> what it says of so many rows.
KINDS = {
    "system-turn": "{rows}: the conversation's own system turn is used, not the system column",
    "left-out": "{rows}: the chat template leaves thoughts of earlier turns, or the text beside a call, out of the prompt",
    "bare-tools": "{rows}: their tools have no type and function around them, which most chat templates expect",
    "tie": "{rows}: answers that are equally good make no pair with each other",
    "both-unsafe": "{rows}: both answers are marked unsafe; the more helpful one is preferred, as the data's authors do",
    "special-text": "{rows} with the text of a special token, the first in {example}",
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
    lines: list[str] = []
    if options := source.get("reading"):
        lines.append(phrase("read with {options}", options=as_typed(options)))
    if unused := source.get("unused"):
        lines.append(phrase("not used: {columns}", columns=_columns(unused, source["rows"])))
    used = source["rows"] - sum(source["refused"].values())
    for kind, count in (source.get("noted") or {}).items():
        text = KINDS.get(kind, f"{{rows}}: {kind}")
        lines.append(phrase(text, rows=_rows(count), example=source.get("example")))
        if kind == "special-text" and count >= NEARLY_ALL * used:
            lines.append(phrase(RENDERED))
    return lines


def together(sources: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Several sources as one, for `notes_on`: the sums of their counts, the first example with the name of its file."""
    summed = {name: Counter[str]() for name in ("unused", "noted", "refused")}
    for source in sources:
        for name, counts in summed.items():
            counts.update(source.get(name) or {})
    found = next((source for source in sources if source.get("example")), None)
    example = f"{found['name']} {found['example']}" if found and len(sources) > 1 else found and found["example"]
    readings = [source.get("reading") or {} for source in sources]
    return {
        "rows": sum(source["rows"] for source in sources),
        "example": example,
        "reading": readings[0] if all(each == readings[0] for each in readings) else {},
        **summed,
    }


def _rows(count: int) -> Phrase:
    return phrase("{count:,} rows", count=count) if count > 1 else phrase("1 row")


def _columns(unused: Mapping[str, int], rows: int) -> Phrase:
    """The names of columns, each with its number of rows where these are not all."""
    shown: list[str] = [
        name if count == rows else phrase("{name} ({rows})", name=name, rows=_rows(count))
        for name, count in unused.items()
    ]
    more = [phrase("{count} more", count=len(shown) - COLUMNS_LISTED)] if len(shown) > COLUMNS_LISTED else []
    return joined(", ", [*shown[:COLUMNS_LISTED], *more])
