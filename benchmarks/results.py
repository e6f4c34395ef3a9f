"""benchmarks/results/*.json -> RESULTS.md: `python -m benchmarks.results`."""

import json
import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.gpu.page import section, table
from benchmarks.growth import figure
from benchmarks.tables import COLUMNS, absent_lines, case_line, gate_rows, machine_line, stage_rows

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parent / "RESULTS.md"
TITLES = {
    "smollm2-135m-cpu": "SmolLM2-135M, two CPU cores",
    "minimind-3-cpu": "MiniMind-3's shape, two CPU cores",
    "qwen3-0.6b-gpu": "Qwen3-0.6B's shape, GPU",
    "qwen3-1.7b-gpu": "A 1.7B shape, GPU",
}
HEAD = """# Measured

Made by `python -m benchmarks.results` from `benchmarks/results/*.json`; `make bench` measures anew. All contestants train the
same weights on the same token ids in one process and take turns; figures are medians, ratios the medians of each round's ratio.
Memory is each contestant's own process: what it takes at most above the loaded weights, a second model's weights apart.
"Live reference" is `benchmarks/baseline.py`: two models, padded rows, full logits, as MiniMind trains. TRL is its own
`DPOTrainer`, without gradient checkpointing. Tokens per second count both sides whole and no padding. A step is all pairs, forward
and backward in micro-batches, and one update by the same fused AdamW. FLOPs are those of products and attention, counted in the
run itself. On a CPU TRL's head scores every position, padding and prompts too; with Triton, on a GPU, the counted ones alone: "on a
GPU" counts its FLOPs so, and is the ratio to expect there where FLOPs decide. Useful FLOPs are what the pairs need: each distinct
token once through the decoder, the head on counted positions, attention on what is seen; what is computed twice counts once.

![pairs per second and memory](results/bench.png)
"""


def load_reports() -> dict[str, dict[str, Any]]:
    """Name of a result's file -> its report, in the order of the page."""
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*-?pu.json"))}
    order = [*TITLES, *(name for name in found if name not in TITLES)]
    return {name: found[name] for name in order if name in found}


def write_results() -> Path:
    """Write the page. Returns its path."""
    reports = load_reports()
    parts = [HEAD]
    for name in [*TITLES, *(name for name in reports if name not in TITLES)]:
        parts += [
            f"## {TITLES.get(name, name)}\n",
            *(_section(reports[name]) if name in reports else ["Not measured.\n"]),
        ]
    told = {
        "windowed": "Families whose attention has windows",
        "noise": "The noise floor of bfloat16",
        "weights": "Weights in bfloat16",
        "kl": "How far a policy has moved: three measures",
        "outcome": "What is learned: held-out pairs, by trainer, recipe and beta",
    }
    for name, title in told.items():
        file = RESULTS / f"{name}.json"
        parts += [f"## {title}\n"]
        parts += _told(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else ["Not measured.\n"]
        if (picture := file.with_suffix(".png")).exists():
            parts.append(f"![{title}](results/{picture.name})\n")
    gpu = RESULTS / "gpu.json"
    parts += ["## One visit to a GPU\n"]
    parts += section(json.loads(gpu.read_text(encoding="utf-8"))) if gpu.exists() else ["Not measured.\n"]
    growth = RESULTS / "growth.json"
    parts += ["## What the cache costs as it grows\n"]
    parts += _growth(json.loads(growth.read_text(encoding="utf-8"))) if growth.exists() else ["Not measured.\n"]
    PAGE.write_text("\n".join(parts), encoding="utf-8")
    return PAGE


def publish(name: str, report: dict[str, Any], console: Console) -> None:
    """Write a report that is one table to results/NAME.json and into the page, and show it."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    columns, rows = report["table"]
    shown = Table(*columns)
    for row in rows:
        shown.add_row(*row)
    console.print(report["what"], shown, f"written: {os.path.relpath(write_results())}", sep="\n")


def _section(report: dict[str, Any]) -> list[str]:
    note = report["case"]["note"]
    lines = [f"**{note}**\n"] if note else []
    lines += [case_line(report) + ".\n", machine_line(report) + ".\n", f"`{report['case']['command']}`\n"]
    for stage in ("stage one", "stage two"):
        lines.append(table([stage, *COLUMNS], stage_rows(report, stage)))
    lines += [f"{line}.\n" for line in absent_lines(report)]
    return [*lines, table(["bar", "asked", "found", ""], gate_rows(report))]


def _told(report: dict[str, Any]) -> list[str]:
    """A report that is one table."""
    note = [f"**{report['note']}**\n"] if report.get("note") else []
    return [
        *note,
        report["what"] + "\n",
        machine_line(report) + ".\n",
        f"`{report['command']}`\n",
        table(*report["table"]),
    ]


def _growth(report: dict[str, Any]) -> list[str]:
    """The figures of growth.py's report, with a column for each cache."""
    parts = [f"{machine_line(report)}.\n", f"`{report['command']}`\n"]
    if isinstance(report["encode"], dict):
        parts.append(table(["encoding", ""], [(name, f"{value:,.0f}") for name, value in report["encode"].items()]))
    for axis in ("pairs", "length"):
        caches = report[axis]
        names = dict.fromkeys(name for cache in caches for name in cache)
        rows = [(name, *(figure(cache.get(name)) for cache in caches)) for name in names]
        parts.append(table(list(rows[0]), rows[1:]))
    return parts


if __name__ == "__main__":
    print(write_results())
