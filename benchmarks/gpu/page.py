"""A visit's outcomes as JSON, as a page of Markdown and as a section of RESULTS.md. No torch."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

from benchmarks.gpu.catalog import CHECKS
from benchmarks.gpu.visit import Outcome

Report = dict[str, Any]
FIGURES = ["check", "figure", "found", "expected", ""]


def report_of(outcomes: Iterable[Outcome], facts: Report) -> Report:
    """What gpu.json holds. facts: of the visit."""
    return {**facts, "checks": [_finite(asdict(each)) for each in outcomes]}


def _finite(value: Any) -> Any:
    """The value with numbers that JSON does not have as text."""
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def page(report: Report) -> str:
    """gpu.md: every figure."""
    parts = ["# One visit to a GPU\n", *section(report)]
    for check in report["checks"]:
        if check["figures"]:
            rows = [row[1:] for row in _rows([check])]
            parts += [f"## {check['name']}\n", f"{_about(check['name'])}\n", table(FIGURES[1:], rows)]
    return "\n".join(parts)


def section(report: Report) -> list[str]:
    """The parts of the section in RESULTS.md: how each check ended, the speeds, and what was not as expected."""
    checks = report["checks"]
    ended = [
        [each["name"], _about(each["name"]), each["status"], each["message"], f"{each['seconds']:.0f}"]
        for each in checks
    ]
    told = [*_rows(each for each in checks if each["name"].startswith(("machine", "speed")))]
    missed = [row for row in _rows(checks) if row[-1] in ("MISSED", "FAILED") and row not in told]
    where = "a CPU, with tiny shapes: a test of the checks themselves" if report["tiny"] else "one card"
    return [
        f"{report['date']}, on {where}; `{report['command']}`.\n",
        table(["check", "what it shows", "", "why", "s"], ended),
        table(FIGURES, told + missed),
    ]


def _about(name: str) -> str:
    return CHECKS[name].about if name in CHECKS else ""


def _rows(checks: Iterable[Report]) -> Iterator[list[str]]:
    for check in checks:
        for figure in check["figures"]:
            verdict = "FAILED" if figure["error"] else {True: "holds", False: "MISSED", None: ""}[figure["holds"]]
            yield [check["name"], figure["name"], figure["error"] or found(figure), figure["expected"], verdict]


def found(figure: Report) -> str:
    """A figure's value with its unit."""
    value = figure["value"]
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float | int):
        value = f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    return f"{value} {figure['unit']}".strip()


def table(columns: list[str], rows: Iterable[list[str]]) -> str:
    """A table of Markdown."""

    def line(row: Iterable[str]) -> str:
        return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in row) + " |"

    return "\n".join([line(columns), line(["---"] * len(columns)), *map(line, rows)]) + "\n"
