"""The figures of `make torture LONG=1` as the table of docs/reliability.md: `python -m tests.torture.table FILE`."""

import json
import os
import platform
import re
import sys
from collections.abc import Iterable, Mapping
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

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


def added(lines: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """The figures by what was done: a row for each command that was killed, one for each kind of fault and of damage."""
    rows: dict[str, dict[str, float]] = {}
    for line in lines:
        kind = line["what"].partition(": ")[0]
        name = line["what"] if kind == "killed" else kind
        row = rows.setdefault(name, dict.fromkeys((*COUNTED, "seconds"), 0))
        for each in COUNTED:
            row[each] += line[each]
        row["seconds"] = max(row["seconds"], line["seconds"])
    return rows


def table(rows: Mapping[str, Mapping[str, float]]) -> str:
    total = {each: sum(row[each] for row in rows.values()) for each in COUNTED}
    total["seconds"] = max(row["seconds"] for row in rows.values())
    lines = ["| " + " | ".join(HEADINGS) + " |", "| --- |" + " --: |" * (len(HEADINGS) - 1)]
    for name, row in [*rows.items(), ("**all**", total)]:
        numbers = " | ".join(f"{row[each]:,}" for each in COUNTED)
        lines.append(f"| {name} | {numbers} | {row['seconds']:,.0f} s |")
    return "\n".join(lines)


def machine() -> str:
    memory = psutil.virtual_memory().total / 1e9
    return (
        f"{date.today()}, {os.cpu_count()} cores, {memory:.0f} GB, {platform.system()} {platform.release().split('-')[0]}, "
        f"Python {platform.python_version()}, torch {version('torch').split('+')[0]}, zarr {version('zarr')}"
    )


def main() -> None:
    lines = [json.loads(line) for line in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()]
    text = f"{BEGIN}\nMeasured on {machine()}.\n\n{table(added(lines))}\n\n{END}"
    page = PAGE.read_text(encoding="utf-8")
    found = re.sub(re.escape(BEGIN) + ".*" + re.escape(END), lambda _: text, page, flags=re.DOTALL)
    PAGE.write_text(found, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
