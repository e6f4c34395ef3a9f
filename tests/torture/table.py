"""The figures of `make torture LONG=1` as the table of docs/reliability.md: `python -m tests.torture.table`."""

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from tests.torture.counting import FILE, known

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
BEGIN, END = "<!-- figures of make torture LONG=1 -->\n", "<!-- end of the figures -->\n"
COUNTED = ("trials", "faults", "lost", "wrong", "tracebacks", "hangs", "leftovers")
HEADINGS = (
    "",
    "trials",
    "kills or faults",
    "work lost",
    "wrong results",
    "tracebacks",
    "hangs",
    "leftovers",
    "longest trial",
)


Row = dict[str, float | None]
# Below the table, where a kept figure says less than its heading does now.
NOTES = {
    "metrics and weights": "Of the files of a run, metrics and weights alone were compared then",
    "without README.md": "All files but README.md were compared then",
}


def added(lines: Iterable[Mapping[str, Any]]) -> dict[str, Row]:
    """The figures by what was done: a row for each command that was killed, one for each kind of fault and of damage.

    A sum is over the tests that looked for it; None where none did.
    """
    rows: dict[str, Row] = {}
    for line in lines:
        kind = line["what"].partition(": ")[0]
        name = line["what"] if kind == "killed" else kind
        name += f" ({list(NOTES).index(line['note']) + 1})" if "note" in line else ""
        row = rows.setdefault(name, dict.fromkeys((*COUNTED, "seconds")))
        for each in COUNTED:
            row[each] = sum_of([row[each], line[each]])
        row["seconds"] = max(row["seconds"] or 0, line["seconds"])
    return rows


def sum_of(numbers: Iterable[float | None]) -> float | None:
    found = [number for number in numbers if number is not None]
    return sum(found) if found else None


def table(rows: Mapping[str, Row]) -> str:
    total: Row = {each: sum_of(row[each] for row in rows.values()) for each in COUNTED}
    total["seconds"] = max(row["seconds"] or 0 for row in rows.values())
    lines = ["| " + " | ".join(HEADINGS) + " |", "| --- |" + " --: |" * (len(HEADINGS) - 1)]
    for name, row in [*rows.items(), ("**all**", total)]:
        numbers = " | ".join("–" if row[each] is None else f"{row[each]:,}" for each in COUNTED)
        lines.append(f"| {name} | {numbers} | {row['seconds']:,.0f} s |")
    return "\n".join(lines)


def made(lines: Collection[Mapping[str, Any]]) -> str:
    """When and where, by machine."""
    machines = dict.fromkeys(line["machine"] for line in lines)
    dates = {each: [line["date"] for line in lines if line["machine"] == each] for each in machines}
    return ";\n".join(f"{' to '.join(sorted({min(days), max(days)}))}, {each}" for each, days in dates.items())


def section() -> str:
    """What stands between BEGIN and END."""
    if not (lines := known(FILE).values()):
        return ""
    noted = {line.get("note") for line in lines}
    notes = [f"({at}) {words}." for at, (name, words) in enumerate(NOTES.items(), 1) if name in noted]
    return "\n" + "\n\n".join([f"Measured {made(lines)}.", table(added(lines)), *notes]) + "\n\n"


def main() -> None:
    page = PAGE.read_text(encoding="utf-8")
    found = re.sub(f"(?<={re.escape(BEGIN)}).*(?={re.escape(END)})", lambda _: section(), page, flags=re.DOTALL)
    PAGE.write_text(found, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
